"""What users do with a server, on plain SGLang and on ours: the answers are the same."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from asking import ALL_PASSED, GREEDY, assert_ran_sparse, generate, prompts
from conftest import cluster, running, server, thorough

pytestmark = pytest.mark.server
MIXED_LENGTHS = (9, 40, 200, 530, 700, 1100, 1600, 2000)


class Asked:
    """The same requests to any server; what is compared is everything that a user sees."""

    def __init__(self, url: str, model: Path) -> None:
        self.url = url
        self.prompts = prompts(model, (600, 1200))
        self.mixed = [prompts(model, (max(length, 60),))[0][-length:] for length in MIXED_LENGTHS]

    def short_prompt(self) -> Any:
        return generate(self.url, self.prompts[0][:9]).token_ids

    def long_prompt_twice(self) -> Any:
        return [generate(self.url, self.prompts[1]).token_ids for _ in range(2)]

    def stream(self) -> Any:
        body = {"input_ids": self.prompts[0], "sampling_params": GREEDY, "stream": True}
        with requests.post(f"{self.url}/generate", json=body, stream=True, timeout=120) as response:
            lines = [line for line in response.iter_lines() if line.startswith(b"data: {")]
        return json.loads(lines[-1].removeprefix(b"data: "))["text"], len(lines) > 4

    def stop_string(self) -> Any:
        whole = requests.post(
            f"{self.url}/generate", json={"input_ids": self.prompts[0], "sampling_params": GREEDY}, timeout=120
        ).json()["text"]
        stop = whole[len(whole) // 2 :][:3]
        stopped = requests.post(
            f"{self.url}/generate",
            json={"input_ids": self.prompts[0], "sampling_params": GREEDY | {"stop": stop}},
            timeout=120,
        ).json()
        return stop, stopped["text"], stopped["meta_info"]["finish_reason"]

    def top_logprobs(self) -> Any:
        body = {"input_ids": self.prompts[0], "sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 3}
        meta = requests.post(f"{self.url}/generate", json=body, timeout=120).json()["meta_info"]
        return [[entry[1] for entry in tokens] for tokens in meta["output_top_logprobs"]]

    def input_logprobs(self) -> Any:
        body = {"input_ids": self.prompts[0], "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0}
        meta = requests.post(f"{self.url}/generate", json=body, timeout=120).json()["meta_info"]
        return [round(entry[0], 3) for entry in meta["input_token_logprobs"][1:]]

    def two_choices(self) -> Any:
        body = {"input_ids": self.prompts[0], "sampling_params": GREEDY | {"n": 2}}
        answers = requests.post(f"{self.url}/generate", json=body, timeout=120).json()
        return [answer["output_ids"] for answer in answers]

    def eight_at_once(self) -> Any:
        with ThreadPoolExecutor(len(self.mixed)) as pool:
            return [answer.token_ids for answer in pool.map(lambda ids: generate(self.url, ids), self.mixed)]

    def aborted_then_next(self) -> Any:
        """The client goes away in the middle of a long answer; the next request is served as ever."""
        body = {"input_ids": self.prompts[1], "sampling_params": GREEDY | {"max_new_tokens": 3000}, "stream": True}
        with requests.post(f"{self.url}/generate", json=body, stream=True, timeout=120) as response:
            next(response.iter_lines())
        return generate(self.url, self.prompts[0]).token_ids


BEHAVIOURS = [name for name in vars(Asked) if not name.startswith("_")]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny()


@pytest.fixture(scope="module")
def plain(model: Path, log_dirs: Iterator[Path]) -> dict[str, Any]:
    with running(server(model, next(log_dirs))) as url:
        asked = Asked(url, model)
        return {name: getattr(asked, name)() for name in BEHAVIOURS}


@pytest.fixture(scope="module")
def ours(model: Path, log_dirs: Iterator[Path], plain: dict[str, Any]) -> Iterator[Asked]:
    arguments = ("--prefill-backend", "apb", "--sp-size", "2", "--prefill-backend-config", ALL_PASSED)
    with running(server(model, next(log_dirs), *arguments, "--enable-metrics")) as url:
        yield Asked(url, model)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaves_as_plain_sglang(behaviour: str, ours: Asked, plain: dict[str, Any]) -> None:
    assert getattr(ours, behaviour)() == plain[behaviour]


def test_answers_and_the_counter_say_which_path_ran(ours: Asked) -> None:
    def counted() -> dict[str, float]:
        text = requests.get(f"{ours.url}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith("sglang_apb:prefill_requests_total")]
        return {
            path: sum(float(line.split()[-1]) for line in lines if f'"{path}"' in line) for path in ("apb", "exact")
        }

    before = counted()
    assert_ran_sparse(generate(ours.url, ours.prompts[1]), num_ranks=2)
    assert generate(ours.url, ours.prompts[1][:100]).prefill == {"method": "exact"}
    after = counted()
    assert (after["apb"] - before["apb"], after["exact"] - before["exact"]) == (1, 1)


def test_sparse_and_exact_prompts_find_their_own_kv_only(ours: Asked, model: Path) -> None:
    prompt = prompts(model, (900,))[0]
    exact = GREEDY | {"custom_params": {"prefill": {"exact": True}}}
    found = [generate(ours.url, prompt, sampling_params=sampling).cached_tokens for sampling in (GREEDY, exact) * 2]
    assert found == [0, 0, 900 - 900 // 4, 899], "of a sparse prompt all but its question"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_openai_answers_say_how_they_were_prefilled(path: str, stream: bool, ours: Asked, model: Path) -> None:
    from openai import OpenAI
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model).decode(ours.prompts[1])
    client = OpenAI(base_url=f"{ours.url}/v1", api_key="none")
    common: dict[str, Any] = {"model": "default", "max_tokens": 4, "stream": stream}
    if path == "completions":
        answer = client.completions.create(prompt=text, **common)
    else:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": text}], **common)
    last = list(answer)[-1] if stream else answer
    assert last.model_dump()["metadata"]["prefill"]["method"] == "apb"


@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ({"prefill": {"question_tokens": 5000}}, "question_tokens=5000 leaves no context in a prompt of 600 tokens"),
        ({"prefill": {"questions": 5}}, "unknown key 'questions'"),
        ({"prefill": 5}, "must be an object"),
    ],
)
def test_a_bad_wish_is_refused_and_the_server_goes_on(custom_params: Any, message: str, ours: Asked) -> None:
    body = {"input_ids": ours.prompts[0], "sampling_params": GREEDY | {"custom_params": custom_params}}
    response = requests.post(f"{ours.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert message in response.text
    too_long = requests.post(f"{ours.url}/generate", json={"input_ids": ours.prompts[1] * 8}, timeout=60)
    assert too_long.status_code == 400
    assert "8192" in too_long.text
    assert len(generate(ours.url, ours.prompts[0]).token_ids) == 32


def test_a_wish_for_the_question_is_followed(ours: Asked) -> None:
    wish = GREEDY | {"custom_params": {"prefill": {"question_tokens": 21}}}
    report = generate(ours.url, ours.prompts[0], sampling_params=wish).prefill
    assert report is not None
    assert report["question_tokens"] == 21


@thorough
def test_the_papers_preset_runs(smollm2: Path, log_dirs: Iterator[Path]) -> None:
    """Its recomputed anchor has more rows than the prompt has tokens."""
    prompt = prompts(smollm2, (2500,))[0]
    with running(
        server(smollm2, next(log_dirs), "--prefill-backend", "apb", "--prefill-backend-config", "paper")
    ) as url:
        answer = generate(url, prompt)
        assert_ran_sparse(answer, num_ranks=1)
        assert generate(url, prompt).cached_tokens == 0, "its KV depends on the question"
        assert generate(url, prompt).token_ids == answer.token_ids


def test_retraction_under_kv_pressure(model: Path, log_dirs: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Six answers need more KV than there is: some are thrown out and prefilled again, with what they had said."""
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "true")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "5")
    asked = prompts(model, (600, 640, 680, 720, 760, 800))
    arguments = ("--prefill-backend", "apb", "--sp-size", "2", "--prefill-backend-config", ALL_PASSED)
    with running(server(model, next(log_dirs), *arguments)) as url, ThreadPoolExecutor(len(asked)) as pool:
        alone = list(pool.map(lambda ids: _with_exact_path(url, ids), asked))
        together = list(pool.map(lambda ids: _with_retractions(url, ids), asked))
    assert [tokens for tokens, _ in together] == alone
    assert sum(num for _, num in together) > 0, "nothing was retracted, so nothing was tested"


def _with_exact_path(url: str, token_ids: list[int]) -> Any:
    exact = GREEDY | {"max_new_tokens": 48, "custom_params": {"prefill": {"exact": True}}}
    return generate(url, token_ids, sampling_params=exact).token_ids


def _with_retractions(url: str, token_ids: list[int]) -> tuple[Any, int]:
    body = {"input_ids": token_ids, "sampling_params": GREEDY | {"max_new_tokens": 48}}
    answer = requests.post(f"{url}/generate", json=body, timeout=300).json()
    return tuple(answer["output_ids"]), answer["meta_info"]["num_retractions"]


def test_a_disaggregated_cluster_serves_many_and_survives_aborts(
    model: Path, log_dirs: Iterator[Path], plain: dict[str, Any]
) -> None:
    config = ("--prefill-backend-config", ALL_PASSED)
    with running(cluster(model, next(log_dirs), 2, *config)) as url:
        asked = Asked(url, model)
        for behaviour in ("short_prompt", "long_prompt_twice", "stop_string", "aborted_then_next", "eight_at_once"):
            assert getattr(asked, behaviour)() == plain[behaviour], behaviour
        _abort_while_prefilling(url, asked.prompts[1])
        assert asked.eight_at_once() == plain["eight_at_once"]


def _abort_while_prefilling(url: str, token_ids: list[int]) -> None:
    def ask() -> None:
        with pytest.raises(requests.Timeout):
            requests.post(f"{url}/generate", json={"input_ids": token_ids, "sampling_params": GREEDY}, timeout=0.05)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1)
