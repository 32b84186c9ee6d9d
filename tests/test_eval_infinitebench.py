"""`sglang-apb eval infinitebench`: prompts that are made or read have the answers that they are rated by."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_apb import cli
from sglang_apb.commands import CommandError
from sglang_apb.commands.eval import infinitebench
from sglang_apb.commands.eval.questions import Question

Start = Callable[..., str]


def made(task: str, num_tokens: int = 600, num_samples: int = 4) -> list[tuple[str, tuple[str, ...]]]:
    return list(infinitebench._fit(task, num_tokens, num_samples, 0, lambda text: len(text.split())))


@pytest.mark.parametrize("task", infinitebench.MADE)
def test_prompts_fill_their_length_and_are_the_same_for_a_seed(task: str) -> None:
    found = made(task)
    assert found == made(task) and len(set(found)) == 4
    assert all(500 < len(text.split()) <= 600 for text, _ in found)


def test_what_is_hidden_is_there() -> None:
    for task in ("passkey", "number_string"):
        places = [text.index(answer) / len(text) for text, (answer,) in made(task)]
        assert places == sorted(places) and places[0] < 0.2 and places[-1] > 0.8
    for _, (answer,) in made("number_string"):
        assert len(answer) == 10 and sum(a == b for a, b in itertools.pairwise(answer)) >= 5
    for text, (answer,) in made("kv_retrieval"):
        pairs = json.loads(text[text.index("{") : text.index("}") + 1])
        (key,) = re.findall(r'Key: "(.*)"', text)
        assert pairs[key] == answer


def test_numbers_to_find_and_functions_to_run_have_these_answers() -> None:
    for text, (answer,) in made("math_find", num_samples=20):
        numbers = sorted(json.loads(text[text.index("[") : text.index("]") + 1]))
        (which,) = set(re.findall(r"the ([a-z ]+) number in the following list", text))
        wanted = {"largest": -1, "second largest": -2, "third largest": -3, "median": len(numbers) // 2}
        wanted |= {"smallest": 0, "second smallest": 1, "third smallest": 2}
        assert answer == str(numbers[wanted[which]])
    for text, (answer,) in made("code_run"):
        functions: dict[str, Any] = {}
        exec(text[text.index("def ") : text.index("Please")], functions)  # what the prompt says
        call = re.findall(r"value of (func_\d+)\((\d+)\)", text)[0]
        assert str(functions[call[0]](int(call[1]))) == answer


@pytest.mark.parametrize(
    ("task", "references", "text", "points"),
    [
        ("passkey", ("12345",), "It is 12345, I think of 9.", 100),
        ("passkey", ("12345",), "1234", 0),
        ("math_find", ("7",), " 7, I think", 100),
        ("passkey", ("71432",), "passkey-71432", 100),
        ("kv_retrieval", ("ab",), "AB", 0),
        ("code_run", ("42",), "3 + 39, so the value is 42.", 100),
        ("code_run", ("42",), "42 and 1", 0),
        ("kv_retrieval", ("ab-cd",), 'The value is "ab-cd".', 100),
        ("longdialogue_qa_eng", ("ADA",), "Ada.", 100),
        ("longbook_choice_eng", ("B",), "The answer is B. It", 100),
        ("longbook_choice_eng", ("B",), "A", 0),
        ("longbook_qa_eng", ("The red house", "a tent"), "red", 200 / 3),
    ],
)
def test_answers_are_rated_as_infinitebench_does(
    task: str, references: tuple[str, ...], text: str, points: float
) -> None:
    assert infinitebench.rate(Question(task, 0, 0, "", references, 9), text) == pytest.approx(points)


def test_published_files_are_read(tmp_path: Path) -> None:
    rows = [
        {"context": "A {book}.", "input": "Who?", "answer": ["Ada"], "options": []},
        {"context": "A book.", "input": "Which?", "answer": ["two"], "options": ["one", "two", "three", "four"]},
    ]
    for task, row in zip(("longbook_qa_eng", "longbook_choice_eng"), rows, strict=True):
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n{}\n")
    (asked,) = infinitebench._read(tmp_path, "longbook_qa_eng", 1)
    assert asked.references == ("Ada",) and "A {book}.\n\nQuestion: Who?\n\nBe very concise." in asked.text
    (asked,) = infinitebench._read(tmp_path, "longbook_choice_eng", 1)
    assert asked.references == ("B",) and asked.text.endswith("\nA. one\nB. two\nC. three\nD. four")
    with pytest.raises(CommandError, match=r"longbook_qa_eng.jsonl, line 2: KeyError 'answer'"):
        infinitebench._read(tmp_path, "longbook_qa_eng", 2)
    with pytest.raises(CommandError, match=r"code_run.jsonl does not exist: --data is to be the folder"):
        infinitebench._read(tmp_path, "code_run", 1)


def test_infinitebench_is_asked(
    smollm2: Path, tmp_path: Path, openai_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def knows(body: dict[str, Any]) -> str:
        return " " + re.findall(r"The pass key is (\d+)", body["messages"][0]["content"])[0]

    options = ["--url", f"apb={openai_server(knows)}", "--model", str(smollm2), "--output", str(tmp_path)]
    options += ["--lengths", "512", "--num-samples", "2", "--tasks", "passkey"]
    assert cli.main(["eval", "infinitebench", *options]) == 0
    assert re.search(r"\| passkey +\| +100.0 \|", capsys.readouterr().out)
    assert cli.main(["eval", "infinitebench", *options[:-1], "longbook_qa_eng"]) == 1
    assert "longbook_qa_eng is not made here: give the folder" in capsys.readouterr().err
