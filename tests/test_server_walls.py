"""What one request does wrong, or we do with it, ends that request: the server goes on, and the next one is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from asking import ALL_PASSED, GREEDY, generate
from conftest import cluster, running, server
from faulty import sitecustomize as faulty
from halves import Half, Server, server_of

from sglang_apb.commands.servers import HOST, LocalCluster

pytestmark = pytest.mark.server
CONFIG = ("--prefill-backend-config", ALL_PASSED)
JSON = {"Content-Type": "application/json"}
PROMPT = [(5 + i * 37) % 40000 for i in range(900)]
FAILED = "The prefill failed (RuntimeError: a fault of this test)."
# The first rank answers clients of one server; decode tells what it has heard first.
FAULTS = {
    faulty.DECIDING: ("The prompt could not be laid out (RuntimeError: a fault of this test).",),
    faulty.PREPARING: (FAILED,),
    faulty.PREPARING_ON_RANK_1: (FAILED, "Another prefill rank could not prepare the prompt; its log says why."),
    faulty.COMPUTING: (FAILED,),
}


def post(url: str, path: str = "/generate", **body: Any) -> requests.Response:
    if path == "/generate":
        body = {"input_ids": PROMPT[:60], "sampling_params": GREEDY} | body
    return requests.post(f"{url}{path}", json=body, timeout=120)


@pytest.fixture(scope="module")
def faults() -> Iterator[None]:
    """Of two ranks, one or both fail at prompts of certain lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(faulty.__file__).parent))
        yield


@pytest.fixture(scope="module")
def single(faults: None, tiny: Callable[..., Path], log_dirs: Iterator[Path]) -> Iterator[str]:
    with running(server(tiny(), next(log_dirs), "--prefill-backend", "apb", "--sp-size", "2", *CONFIG)) as url:
        yield url


@pytest.fixture(scope="module")
def pair(faults: None, tiny: Callable[..., Path], log_dirs: Iterator[Path]) -> Iterator[LocalCluster]:
    contact = ("--kv-transfer-config", '{"contact_seconds": 2}', "--enable-metrics")
    service = cluster(tiny(), next(log_dirs), 2, *CONFIG, arguments=contact)
    with running(service):
        yield service


@pytest.mark.parametrize("length", FAULTS)
def test_a_fault_of_ours_ends_its_request_on_one_server(length: int, single: str) -> None:
    check_fault(single, length)


@pytest.mark.parametrize("length", FAULTS)
def test_a_fault_of_ours_ends_its_request_in_a_cluster(length: int, pair: LocalCluster) -> None:
    check_fault(pair.url, length)


def check_fault(url: str, length: int) -> None:
    wanted = generate(url, PROMPT).token_ids
    response = post(url, input_ids=[5] * length)
    assert response.status_code >= 400 and any(text in response.text for text in FAULTS[length]), response.text
    assert generate(url, PROMPT).token_ids == wanted


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"input_ids": [5] * 2999 + [60_000]}, "input_ids has 60000"),
    "stop ids": ({"sampling_params": {"stop_token_ids": [999_999], "min_new_tokens": 2}}, "stop_token_ids has 999999"),
    "logprobs": ({"return_logprob": True, "top_logprobs_num": 60_000}, "must be 0 to"),
    "embeddings": ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides is not for clients"),
    "parameters": ({"sampling_params": {"custom_params": "abc"}}, "sampling_params.custom_params: expected"),
    "choices": ({"sampling_params": {"n": 10**9}}, "n=1000000000 must be"),
    "pattern": ({"sampling_params": {"stop_regex": "(a+)+$"}}, "stop_regex='(a+)+$'"),
    "session": ({"session_params": {"id": "none"}}, "session"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_answered_with_a_sentence(what: str, single: str) -> None:
    check_refused(single, what)
    assert len(generate(single, PROMPT).token_ids) == GREEDY["max_new_tokens"]


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_each_half_answers_a_bad_request_with_a_sentence(what: str, pair: LocalCluster) -> None:
    for half in halves_of(pair):
        check_refused(half.url, what)
    assert len(generate(pair.url, PROMPT).token_ids) == GREEDY["max_new_tokens"]


def check_refused(url: str, what: str) -> None:
    fields, sentence = BAD_REQUESTS[what]
    response = post(url, **fields, bootstrap_room=77, bootstrap_host=HOST)
    assert response.status_code == requests.codes.bad_request and sentence in response.text, response.text


def halves_of(pair: LocalCluster) -> tuple[Server, Server]:
    return server_of(pair, 1, "prefill"), server_of(pair, 2, "decode")


BAD_BODIES = [
    "null",
    "[]",
    "3",
    '"text"',
    '{"messages": [{"role": "user", "content": "Hi"}], "response_format": [1]}',
    '{"messages": [{"role": "user", "content": "Hi"}], "response_format": 3}',
    '{"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_schema", "schema": [1]}}',
]


@pytest.mark.parametrize("body", BAD_BODIES)
def test_a_chat_of_another_form_is_answered_with_a_sentence(body: str, single: str) -> None:
    """SGLang reads it before it looks at its types."""
    response = requests.post(f"{single}/v1/chat/completions", data=body, headers=JSON, timeout=60)
    assert response.status_code == 400 and response.json()["message"], response.text


def test_choices_through_a_cluster(pair: LocalCluster) -> None:
    alone = generate(pair.url, PROMPT).token_ids
    answers = post(pair.url, input_ids=PROMPT, sampling_params=GREEDY | {"n": 3}).json()
    assert [tuple(answer["output_ids"]) for answer in answers] == [alone] * 3
    body = {"model": "any", "prompt": ["one two", "three"], "n": 2, "max_tokens": 4, "temperature": 0}
    choices = post(pair.url, "/v1/completions", **body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"] != choices[2]["text"] == choices[3]["text"]
    body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "max_tokens": 4, "stream": True}
    lines = post(pair.url, "/v1/chat/completions", **body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    ended = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ended) == [0, 1]


def test_halves_answer_their_health_checks(pair: LocalCluster) -> None:
    """They run a token through the model, with SGLang's own room 0."""
    for half in halves_of(pair):
        response = requests.get(f"{half.url}/health_generate", timeout=60)
        assert response.status_code == requests.codes.ok, half.name


@pytest.mark.parametrize("room", [-1, 0, 2**63])
def test_rooms_that_cannot_be(room: int, pair: LocalCluster) -> None:
    for half in halves_of(pair):
        fields = {"bootstrap_host": HOST, "bootstrap_port": half.bootstrap_port}
        response = post(half.url, bootstrap_room=room, **fields)
        assert response.status_code == requests.codes.bad_request
        assert f"bootstrap_room={room} must be 1 to 2^63 - 1" in response.text


def test_a_room_without_the_host_of_prefill(pair: LocalCluster) -> None:
    for half in halves_of(pair):
        assert "bootstrap_host is missing" in post(half.url, bootstrap_room=78).text
    assert len(generate(pair.url, PROMPT).token_ids) == GREEDY["max_new_tokens"]


def test_prefill_alone_computes_what_nobody_fetches(pair: LocalCluster) -> None:
    """`bench ttft --prefill-only` asks so; decode would go on from whatever its pages hold."""
    nobody = {"input_ids": PROMPT, "bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    prefill, decode = (post(half.url, **nobody) for half in halves_of(pair))
    assert prefill.ok and prefill.json()["meta_info"]["prefill"]["method"] == "apb", prefill.text
    assert decode.status_code == requests.codes.bad_request and "for the server's own checks" in decode.text


def test_prompt_logprobs_that_would_be_lost_are_refused(pair: LocalCluster) -> None:
    body = {"model": "any", "prompt": "one two", "echo": True, "logprobs": 2, "max_tokens": 3}
    assert "echo with logprobs is not available" in post(pair.url, "/v1/completions", **body).text
    wish = {"return_logprob": True, "logprob_start_len": 0}
    assert "logprob_start_len with stream is not available" in post(pair.url, stream=True, **wish).text
    answer = post(pair.url, **wish).json()  # the router adds prefill's
    assert len(answer["meta_info"]["input_token_logprobs"]) == 60


def test_answers_in_a_given_form(pair: LocalCluster) -> None:
    sampling = GREEDY | {"regex": "[0-9]{3}"}
    assert post(pair.url, sampling_params=sampling).json()["text"].isdigit()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for more in ({"response_format": {"type": "json_object"}}, {"tools": tools, "tool_choice": "required"}):
        body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | more
        assert post(pair.url, "/v1/chat/completions", **body).ok


def test_a_request_that_one_half_alone_has_is_given_up(pair: LocalCluster) -> None:
    """At once where the other half has refused it, before it came or after, else after `contact_seconds`."""
    prefill, decode = halves_of(pair)
    fields = {"bootstrap_host": HOST, "bootstrap_port": prefill.bootstrap_port}
    body = {"input_ids": PROMPT[:60], "bootstrap_room": 81, "sampling_params": {"top_p": 7}} | fields
    refused = Half(decode.url, {"input_ids": PROMPT[:60], "bootstrap_room": 81} | fields)
    assert post(prefill.url, **body).status_code == requests.codes.bad_request
    refused.join(15)
    assert "top_p must be in (0, 1], got 7" in refused.text, refused.text
    assert post(prefill.url, **body | {"bootstrap_room": 84}).status_code == requests.codes.bad_request
    answer = post(decode.url, input_ids=PROMPT[:60], bootstrap_room=84, **fields)
    assert "top_p must be in (0, 1], got 7" in answer.text, answer.text
    sampling = {"max_new_tokens": 2}
    refused = Half(prefill.url, {"input_ids": PROMPT[:60], "bootstrap_room": 83, "sampling_params": sampling} | fields)
    body |= {"bootstrap_room": 83}
    assert post(decode.url, **body).status_code == requests.codes.bad_request
    refused.join(15)
    assert "top_p must be in (0, 1], got 7" in refused.text, refused.text
    alone = Half(decode.url, {"input_ids": PROMPT[:60], "bootstrap_room": 82} | fields)
    alone.join(60)
    assert "The prefill server has not got the request within 2 s" in alone.text, alone.text
    assert decode.used() == 0
