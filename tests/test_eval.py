"""`sglang-apb eval`: the same prompts to every contestant, answers that are kept, and what is said of them."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_openai import REPORT
from scipy.stats import t as student

from sglang_apb import cli
from sglang_apb.commands import CommandError
from sglang_apb.commands.eval import asking, contestants, needles, prompts, ruler
from sglang_apb.commands.eval.questions import Answer, AnswerFile, Question
from sglang_apb.commands.eval.scores import Score, difference, mean_score

Start = Callable[..., str]


def reads(body: dict[str, Any]) -> str:
    return " " + re.findall(r"magic number for \w+ is (\d+)", body["prompt"])[0]


def guesses(body: dict[str, Any]) -> str:
    return " 1234567"


def _count_words(text: str) -> int:
    return len(text.split())


# scores


def scores(contestant: str, **points: list[float]) -> list[Score]:
    return [Score(contestant, task, 1, i, one) for task, all_ in points.items() for i, one in enumerate(all_)]


def test_tasks_count_alike() -> None:
    assert mean_score(scores("a", one=[100.0] * 9, two=[0.0])) == 50
    assert mean_score([]) is None


def test_a_difference_is_of_pairs() -> None:
    """Samples that differ by as much everywhere leave no doubt, however far they lie apart."""
    exact = scores("exact", one=[0.0, 100.0, 50.0], two=[10.0, 90.0])
    worse = scores("a", one=[-5.0, 95.0, 45.0], two=[5.0, 85.0, 1000.0])
    found = difference(worse, exact)
    assert found is not None and (found.mean, found.half_width, found.num_pairs) == (-5, 0, 5)
    assert str(found) == "-5.0 ± 0.0"


def test_the_interval_is_that_of_a_mean_of_means() -> None:
    """Differences -10, 10 and 0, 0, 3: variances 200 and 3, of means over 2 and 3 samples; 1.02 degrees of freedom."""
    exact = scores("exact", one=[0.0] * 2, two=[0.0] * 3)
    found = difference(scores("a", one=[-10.0, 10.0], two=[0.0, 0.0, 3.0]), exact)
    assert found is not None and found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx(student.ppf(0.975, 101**2 / (100**2 + 1 / 2)) * math.sqrt(101) / 2)


def test_a_few_pairs_have_a_wide_interval() -> None:
    found = difference(scores("a", one=[0.0, -10.0]), scores("exact", one=[0.0, 0.0]))
    assert found is not None and found.half_width == pytest.approx(63.5, abs=0.1)  # t = 12.7 with one degree


def test_one_pair_has_no_interval() -> None:
    found = difference(scores("a", one=[1.0]), scores("exact", one=[2.0]))
    assert found is not None and found.half_width is None and str(found) == "-1.0"
    assert difference(scores("a", one=[1.0]), []) is None


# answers that are kept


def question(index: int, text: str = "What?") -> Question:
    return Question("task", 8, index, text, ("this",), 4)


def answer_to(asked: Question) -> Answer:
    return Answer(asked.key, asked.digest, "this", 8, 0.1, {})


def test_answers_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path, made_with = tmp_path / "answers" / "a.jsonl", {"model": "m"}
    file = AnswerFile(path, made_with)
    threads = [threading.Thread(target=file.add, args=(answer_to(question(i)),)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path.write_text(path.read_text() + '{"key": "task/8/20", "dig')  # killed while it wrote
    again = AnswerFile(path, made_with)
    assert again.missing([question(i) for i in range(22)]) == [question(20), question(21)]
    again.add(answer_to(question(20)))
    assert AnswerFile(path, made_with).get(question(20)) == answer_to(question(20))


@pytest.mark.parametrize(("text", "sentence"), [("", None), ('{"mo', None), ("{}\nx\n", "line 2 is no JSON")])
def test_a_file_that_was_broken_off(text: str, sentence: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    if sentence is None:
        AnswerFile(tmp_path / "a.jsonl", {"model": "m"}).add(answer_to(question(0)))
        assert AnswerFile(tmp_path / "a.jsonl", {"model": "m"}).get(question(0)) is not None
        return
    with pytest.raises(CommandError, match=sentence):
        AnswerFile(tmp_path / "a.jsonl", {})


def test_answers_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    AnswerFile(path, {"model": "m"}).add(answer_to(question(0)))
    with pytest.raises(CommandError, match=r"made with .*\"m\".*, not with .*\"n\".*: give another --output"):
        AnswerFile(path, {"model": "n"})
    with pytest.raises(CommandError, match="has the answer to another task/8/0"):
        AnswerFile(path, {"model": "m"}).missing([question(0, "Why?")])


# needles, and what every kind does


def test_prompts_are_the_same_for_a_seed_and_fill_their_length() -> None:
    prompts = needles.build_prompts(1000, 5, seed=3, count_tokens=_count_words)
    assert prompts == needles.build_prompts(1000, 5, seed=3, count_tokens=_count_words)
    assert prompts != needles.build_prompts(1000, 5, seed=4, count_tokens=_count_words)
    assert len({prompt.text for prompt in prompts}) == 5
    for prompt in prompts:
        assert 1000 - 20 < _count_words(prompt.text) == prompt.num_tokens <= 1000


def test_each_prompt_has_its_needle_once_at_its_depth() -> None:
    for prompt in needles.build_prompts(1000, 5, seed=0, count_tokens=_count_words):
        needle = needles.NEEDLE.format(city=prompt.city, number=prompt.number)
        assert prompt.text.count(needle) == prompt.text.count(prompt.number) == 1
        assert prompt.text.index(needle) / len(prompt.text) == pytest.approx(prompt.depth, abs=0.08)
        assert prompt.text.endswith(f"The special magic number for {prompt.city} mentioned in the text is")


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit in 20 tokens"):
        needles.build_prompts(20, 1, seed=0, count_tokens=_count_words)


@pytest.fixture
def run(smollm2: Path, tmp_path: Path) -> Callable[..., int]:
    """`sglang-apb eval needles` with SmolLM2's tokenizer, three prompts a length, into tmp_path."""

    def start(*options: str, lengths: str = "256,512") -> int:
        common = ["--model", str(smollm2), "--lengths", lengths, "--num-samples", "3", "--output", str(tmp_path)]
        return cli.main(["eval", "needles", *common, *options])

    return start


def test_every_contestant_is_scored(
    run: Callable[..., int], tmp_path: Path, openai_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["--url", f"exact={openai_server(guesses)}", "--url", f"apb={openai_server(reads)}"]
    assert run(*urls) == 0
    output = capsys.readouterr().out
    assert re.search(r"\| 256 tokens \| +exact \| +apb \| apb - exact +\|", output)
    assert re.search(r"\| needle +\| +0.0 \| +100.0 \| +\+100.0 ± 0.0 \|", output)
    assert re.search(r"\| apb +\| +512 \| +3 \| +0% \| +31% \|", output)
    result = json.loads((tmp_path / "result.json").read_text())
    means = {(row["contestant"], row["length"]): row["mean"] for row in result["scores"] if row["task"] is None}
    assert means == {(name, n): points for name, points in (("exact", 0), ("apb", 100)) for n in (256, 512, None)}
    assert result["machine"]["num_cores"] >= 1 and result["settings"]["benchmark"] == "needles"
    assert (tmp_path / "scores.png").stat().st_size > 5000
    lines = (tmp_path / "answers" / "apb.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prefill"] == REPORT for line in lines[1:]) and len(lines) == 7


def test_a_run_goes_on_where_it_was_broken_off(
    run: Callable[..., int], tmp_path: Path, openai_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def breaks_off(body: dict[str, Any]) -> str | None:
        asked.append(body["prompt"])
        return None if len(asked) == 4 else reads(body)

    url = f"apb={openai_server(breaks_off)}"
    assert run("--url", url, "--at-once", "1") == 1
    output, error = capsys.readouterr()
    assert "broke off its answer to needle/512/1" in error and "| needle     | 100.0 |" in output
    costs = json.loads((tmp_path / "result.json").read_text())["costs"]
    kept = {row["length"]: row["num_answers"] for row in costs}
    assert kept == {256: 2, 512: 1}, "what was measured is kept, and is of every length"
    assert run("--url", url, "--at-once", "1") == 0
    assert len(asked) == 7 and asked[3] == asked[4] and len(set(asked)) == 6
    assert run("--url", url) == 0, "all is answered, nobody is asked"
    assert len(asked) == 7


def test_asked_twice_the_second_answer_counts(run: Callable[..., int], tmp_path: Path, openai_server: Start) -> None:
    asked: list[str] = []

    def learns(body: dict[str, Any]) -> str:
        asked.append(body["prompt"])
        return reads(body) if asked.count(body["prompt"]) == 2 else " no"

    url = f"apb={openai_server(learns)}"
    assert run("--url", url, "--twice", "--at-once", "1") == 0
    assert len(asked) == 12 and asked[::2] == asked[1::2]
    result = json.loads((tmp_path / "result.json").read_text())
    assert {row["mean"] for row in result["scores"]} == {100}
    assert run("--url", url) == 1, "answers of another kind are not mixed with these"


@pytest.mark.parametrize(("servers_per_gpu", "gpus"), [(1, [[0, 2], [0, 2], [0]]), (2, [[0, 0, 2, 2], [0]])], ids=str)
def test_servers_are_spread_over_gpus(
    servers_per_gpu: int, gpus: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks, on four GPUs."""

    class Server(nullcontext[None]):
        url = ""

        def __init__(self, gpu: int):
            super().__init__()
            self.gpu = gpu

        def wait_ready(self) -> None:
            started[-1].append(self.gpu)

    started: list[list[int]] = []
    monkeypatch.setattr(contestants, "num_gpus", lambda: 4)
    monkeypatch.setattr(contestants, "_server", lambda contestant, args, log_dir, gpu, number: Server(gpu))
    args = argparse.Namespace(url=None, sp_size=2, servers_per_gpu=servers_per_gpu, server_args=[])
    waves = contestants.running([contestants.Contestant(name) for name in "abcde"], args, Path())
    started.append([])
    for _ in waves:
        started.append([])
    assert started[:-1] == gpus


def test_a_server_that_is_not_there_is_named(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", "apb=http://127.0.0.1:9") == 1
    assert "http://127.0.0.1:9/model_info does not answer" in capsys.readouterr().err


def test_a_url_that_is_none_is_named(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", "apb=nowhere") == 1
    assert "nowhere/model_info does not answer: Invalid URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "lengths", "sentence"),
    [
        (["--config", "a={}", "--config", "a={}"], "256", "'a' is the name of two contestants"),
        (["--config", 'a={"no": 1}'], "256", "--config a: .*unknown"),
        (["--url", "a=http://x", "--config", "b={}"], "256", "--url asks servers that run"),
        (["--", "--api-key", "k"], "256", "--api-key: servers started here are asked from this machine alone"),
        ([], "256,9000", "--lengths 9000: the model takes 8192 tokens"),
        ([], "20", "does not fit in 4 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: list[str], lengths: str, sentence: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options, lengths=lengths) == 1
    assert re.search(sentence, capsys.readouterr().err)


def test_a_length_above_a_running_servers_is_refused(
    run: Callable[..., int], openai_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--url", f"apb={openai_server(reads)}", lengths="9000") == 1
    assert "a prompt of 9000 tokens, its answer included, is longer than" in capsys.readouterr().err


def test_a_name_without_a_value_is_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--url", "http://127.0.0.1:9")
    assert "must be NAME=VALUE" in capsys.readouterr().err


# prompts


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a"', "line 2: Expecting ','"),
        ('["a"]', "line 2: an object with messages or prompt is wanted"),
        ('{"text": "a"}', "line 2: an object with messages or prompt is wanted"),
        ('{"prompt": "a", "messages": []}', "line 2: an object with messages or prompt is wanted"),
        ('{"prompt": 3}', "line 2: prompt and answer must be texts"),
        ('{"prompt": "a", "answer": 3}', "line 2: prompt and answer must be texts"),
        ('{"prompt": "a", "answer": ""}', "line 2: answer is empty"),
        ('{"messages": [{"content": "a", "role": 1}]}', "line 2: messages must be a list of objects"),
        ('{"messages": []}', "line 2: messages is empty"),
        ('{"messages": [{"content": "a"}]}', "line 2: messages must be a list of objects with role and content"),
    ],
)
def test_a_broken_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(CommandError, match=re.escape(f"{file}, {sentence}")):
        prompts.read(file, 8)


def test_prompts_and_chats_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Who?"}]
    file.write_text(
        json.dumps({"messages": chat, "answer": "Ada"}) + '\n\n{"prompt": "Once\u2028"}\n', encoding="utf-8"
    )
    first, second = prompts.read(file, 8)
    assert (json.loads(first.text), first.references, first.index) == (chat, ("Ada",), 1)
    assert (second.text, second.references, second.index, second.is_completion) == ("Once\u2028", (), 3, True)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"cannot be read: .*No such file"):
        prompts.read(tmp_path / "none", 8)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(CommandError, match="has no prompts"):
        prompts.read(tmp_path / "empty", 8)


def compared(*logprobs: float | None, **right: bool | None) -> list[dict[str, Any]]:
    common = {"contestant": "apb", "parted_at": None if right.get("same", True) else 3, "logprob_exact": -1.0}
    common |= {"exact_is_right": right.get("exact"), "sparse_is_right": right.get("sparse")}
    return [common | {"line": line, "logprob_sparse": logprob} for line, logprob in enumerate(logprobs)]


GOOD, BAD, FEW = "turn it on for these prompts.", "stay with exact attention for these prompts.", "ask more."


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        (compared(-1.01, -1.02, -1.015), GOOD),
        (compared(-1.2, -1.21, -1.22), BAD),
        (compared(-1.01, -1.2), FEW),
        (compared(-1.0), FEW),
        (compared(-1.0, -1.0, exact=True, sparse=True), GOOD),
        (compared(-1.0, -1.0, exact=True, sparse=False), BAD),
        (compared(-1.0, -1.0, exact=False, sparse=True), GOOD),
        (compared(None, None), GOOD),  # the same answers
        (compared(None, None, same=False), BAD),
        (compared(None, None, same=False, exact=True, sparse=True), GOOD),
    ],
)
def test_the_last_sentence_says_whether_to_turn_it_on(rows: list[dict[str, Any]], end: str) -> None:
    assert prompts._verdict("apb", rows).endswith(end)


def test_likelihoods_are_told_whatever_the_transfer_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a cluster two prompts of different lengths have different reports."""
    report = {"method": "apb", "num_blocks": 4, "anchor": 8, "passing": 2, "selector": "key_diff", "question_tokens": 9}
    meta = {"prefill": report | {"question_tokens": 11, "kv_bytes": 99}}
    answer = {"meta_info": meta | {"input_token_logprobs": [[None, 3], [-1.0, 4], [-2.0, 5]]}}
    monkeypatch.setattr(prompts, "_generate", lambda *_, **__: answer)
    assert prompts.logprobs_of("http://x", [1, 2, 3], [4, 5], report | {"kv_bytes": 77}) == [-1.0, -2.0]
    assert prompts.logprobs_of("http://x", [1, 2, 3], [4, 5], report | {"anchor": 16}) is None


def test_answers_that_were_compared_with_another_one_are_asked_again(tmp_path: Path) -> None:
    files = [AnswerFile(tmp_path / name, {}) for name in ("exact", "apb")]
    asked = question(0)
    for file, more in zip(files, ({"token_ids": [1]}, {"exact_token_ids": [1]}), strict=True):
        file.add(replace(answer_to(asked), more=more))
    assert prompts._missing([asked], files[1], files[0]) == prompts._missing([asked], files[0], files[0]) == []
    files[0].add(replace(answer_to(asked), more={"token_ids": [2]}))
    assert prompts._missing([asked], files[1], files[0]) == [asked]


# RULER


@pytest.mark.parametrize(
    ("task", "references", "text", "points"),
    [
        ("niah_multivalue", ("11", "22", "33", "44"), " 11, 33\x00 and 22", 75.0),
        ("vt", ("ABC", "DEF"), "abc def", 100.0),
        ("qa_1", ("Paris", "the city"), "It is PARIS.", 100.0),  # one of several will do
        ("qa_1", ("Paris",), "", 0.0),
    ],
)
def test_answers_are_rated_as_nvidias_package_does(
    task: str, references: tuple[str, ...], text: str, points: float
) -> None:
    assert ruler.rate(Question(task, 4096, 0, "", references, 32), text) == points


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_answers_beginning_is_the_assistants(task: str, openai_server: Start) -> None:
    """As in RULER's own templates; in a user's message some models say it again, and have no tokens left."""
    settings = ruler._settings(task)
    values = dict.fromkeys(re.findall(r"{(\w+)}", settings["template"] + settings["answer_prefix"]), "x")
    text, prefix = settings["template"].format(**values), settings["answer_prefix"].format(**values)
    question = ruler._question(task, 4096, 0, {"input": text + prefix, "outputs": ["y"]})
    asked: list[dict[str, Any]] = []
    asking.ask(openai_server(lambda body: asked.append(body) or " y"), question)
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": prefix}]
    assert asked[0]["messages"] == said and asked[0]["continue_final_message"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "niah_single_9"], "'niah_single_9' is none of niah_single_1"),
        (["--tasks", "vt", "--lengths", "512"], "RULER's vt takes at least 1024 tokens"),
        (["--tasks", "qa_1", "--lengths", "2048,8192"], "RULER's qa_1 takes at least 4096 tokens"),
    ],
)
def test_what_ruler_cannot_make_is_refused(
    options: list[str], sentence: str, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(["eval", "ruler", "--model", str(smollm2), *options]) == 1
    except SystemExit as error:
        assert error.code == 2
    assert sentence in capsys.readouterr().err


def test_ruler_without_its_package_says_what_to_install(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "long_context_eval", None)
    monkeypatch.setattr(ruler, "find_spec", lambda name: None)
    assert cli.main(["eval", "ruler", "--model", str(smollm2)]) == 1
    assert "pip install 'sglang-apb[eval]'" in capsys.readouterr().err


def test_made_prompts_are_kept_and_serve_for_fewer(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's own chat template they have the length that was asked for, answers included."""
    maker = ruler._Maker(str(smollm2), tmp_path, seed=42, num_samples=3, num_template_tokens=40)
    three = maker.make("vt", 1024)
    assert len(three) == 3 and all(700 < row["length"] <= 1024 - 40 for row in three)
    monkeypatch.setattr(ruler._Maker, "_run", lambda *_: pytest.fail("made once more"))
    maker = ruler._Maker(str(smollm2), tmp_path, seed=42, num_samples=2, num_template_tokens=40)
    assert maker.make("vt", 1024) == three[:2]
