"""The door: what a request may ask for, and the sentences for what it may not."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_apb.patches import door, insides, request_checks

from sglang_apb import admission, stop_patterns
from sglang_apb.admission import AdmissionError, Limits

LIMITS = Limits(vocab_size=1000, hidden_size=4)
HALF = Limits(vocab_size=1000, hidden_size=4, half="decode")
PROMPT = [5, 6, 7, 8]


def record(sampling: dict[str, Any] | None = None, **fields: Any) -> TokenizedGenerateReqInput:
    """What SGLang makes of a request for the prompt PROMPT."""
    params = SamplingParams(**(sampling or {}))
    params.normalize(SimpleNamespace(encode=lambda text, **_: list(text)))
    usual: dict[str, Any] = {
        "input_text": None,
        "input_ids": array("q", PROMPT),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return TokenizedGenerateReqInput(sampling_params=params, **usual | fields)


def ids(*numbers: int) -> dict[str, Any]:
    return {"input_ids": array("q", numbers)}


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({}, {}),
        ({"temperature": 0}, {"return_logprob": True, "top_logprobs_num": 1000, "logprob_start_len": 4}),
        ({"top_k": -1, "min_new_tokens": 3, "max_new_tokens": 9, "stop_token_ids": [0, 999]}, ids(0, 999)),
        ({"logit_bias": {"5": -100.0}, "stop_regex": r"\d+\.\d+|(foo|bar)+"}, {}),
        ({}, {"input_ids": None, "input_embeds": [[0.0] * 4] * 2}),
        ({}, ids() | {"session_params": {"id": "s"}}),  # the session has the prompt
        ({"n": 128, "stream_interval": 1}, {"multi_item_delimiter_indices": [0, 3]}),
    ],
)
def test_what_a_server_answers_is_let_in(sampling: dict[str, Any], fields: dict[str, Any]) -> None:
    admission.check(record(sampling, **fields), LIMITS)


@pytest.mark.parametrize(
    ("sampling", "fields", "sentence"),
    [
        ({}, ids(1, 1000), "input_ids has 1000, which is not among the model's tokens, 0 to 999"),
        ({}, ids(-1), "input_ids has -1"),
        ({}, ids(), "the prompt has no tokens"),
        ({"stop_token_ids": [1000]}, {}, "stop_token_ids has 1000"),
        ({"top_k": 2**31}, {}, r"top_k=2\.14748e\+09 must be 1 to"),
        ({"temperature": 1e300}, {}, r"temperature=1e\+300 must be 0 to 10000"),
        ({"repetition_penalty": 1e-300}, {}, "repetition_penalty=1e-300 must be 0.01 to 2"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, {}, "min_new_tokens="),
        ({"stream_interval": -1}, {}, "stream_interval=-1 must be 1 to"),
        ({"n": 129}, {}, "n=129 must be a whole number of 1 to 128"),
        ({"logit_bias": {"5": 1e39}}, {}, r"logit_bias\[5\]=1e\+39 must be"),
        ({"logit_bias": {"5": float("nan")}}, {}, r"logit_bias\[5\]=nan must be"),
        ({"stop_regex": "(a+)+$"}, {}, r"stop_regex='\(a\+\)\+\$' repeats what itself repeats"),
        ({}, {"top_logprobs_num": 1001}, r"top_logprobs_num \(logprobs\) = 1001 must be 0 to 1000"),
        ({}, {"top_logprobs_num": -1}, "must be 0 to 1000"),
        ({}, {"logprob_start_len": 5}, "logprob_start_len=5 must be -1 to 4"),
        ({}, {"logprob_start_len": -2}, "logprob_start_len=-2"),
        ({}, {"input_ids": None, "input_embeds": [[0.0] * 3]}, "a row of 3 numbers, and the model takes 4"),
        ({}, {"input_ids": None, "input_embeds": [[float("inf")] * 4]}, "not finite"),
        ({}, {"http_worker_ipc": "ipc:///tmp/x"}, "http_worker_ipc is not for clients"),
        ({}, {"extra_key": "a\0apb"}, r"extra_key='a\\x00apb' has a zero byte"),
        ({}, {"need_wait_for_mm_inputs": True}, "need_wait_for_mm_inputs is not for clients"),
        ({}, {"multi_item_delimiter_indices": [4]}, "has 4: positions in the prompt are 0 to 3"),
        ({}, {"token_indices_to_pool": [-1]}, "has -1: positions in the prompt"),
    ],
)
def test_what_could_end_a_scheduler_is_refused(sampling: dict[str, Any], fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdmissionError, match=sentence):
        admission.check(record(sampling, **fields), LIMITS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_logprobs_num": 129}, "must be 0 to 128 when prefill and decode are two servers"),
        ({"session_params": {"id": "s"}}, "session_params is not available"),
        ({"input_ids": None, "input_embeds": [[0.0] * 4]}, "input_embeds is not available"),
        ({"token_ids_logprob": [5]}, "token_ids_logprob is not available"),
        ({"stream": True, "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len with stream is not"),
        ({"bootstrap_room": -1}, r"bootstrap_room=-1 must be 1 to 2\^63 - 1"),
        ({"bootstrap_room": 0}, "bootstrap_room=0"),  # SGLang's decode takes it for "nothing has come yet"
        ({"bootstrap_room": 2**63}, "bootstrap_room=9223372036854775808"),
        ({"bootstrap_room": 7}, "bootstrap_host is missing"),  # SGLang's decode would end on it
        ({"bootstrap_room": 7, "bootstrap_host": ""}, "bootstrap_host is missing"),
        ({"bootstrap_port": 65536}, "bootstrap_port=65536 must be 1 to 65535"),
        ({"disagg_prefill_dp_rank": -1}, "disagg_prefill_dp_rank=-1"),
        ({"bootstrap_host": "2.2.2.2", "bootstrap_room": 0} | ids(*range(5)), "for the server's own checks"),
    ],
)
def test_what_two_servers_cannot_do_together_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdmissionError, match=sentence):
        admission.check(record(**fields), HALF)


def test_sglangs_own_checks_pass() -> None:
    admission.check(record(bootstrap_host="2.2.2.2", bootstrap_room=0), HALF)


def test_prefill_alone_may_be_timed() -> None:
    """As `bench ttft --prefill-only` does."""
    nobody: dict[str, Any] = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    admission.check(record(**nobody, **ids(*range(5))), replace(HALF, half="prefill"))


@pytest.mark.parametrize(
    ("pattern", "is_refused"),
    [
        (r"(a+)+$", True),
        (r"(a|ab)*c", True),
        (r"(?:(a)|b+)*", True),
        (r"(.*a){20}", True),
        (r"(?=(a+)+)b", True),
        (r"(a)?(?(1)(b+)+|c)", True),
        (r"a*a*a*b", True),
        (r"a{0,99}a{0,99}a{0,99}b", True),
        (r"(foo|bar)+", False),
        (r"(a|b)*", False),  # one set of letters to `re`
        (r"(?:x{2}){3}", False),
        (r"\n\n+", False),
        (r"[0-9]+\.[0-9]+", False),
        (r"(?:Q|A)\d{1,3}:", False),
    ],
)
def test_stop_patterns(pattern: str, is_refused: bool) -> None:
    assert bool(stop_patterns.find_fault(pattern)) == is_refused


def test_a_stop_pattern_without_an_end_is_tried_on_the_end_of_an_answer() -> None:
    asked = record({"stop_regex": "a+"})
    assert asked.sampling_params.stop_regex_max_len > 256
    admission.check(asked, LIMITS)
    assert asked.sampling_params.stop_regex_max_len == 256


@pytest.mark.parametrize(
    ("sampling", "fields", "sentence"),
    [
        ({"custom_params": "abc"}, {}, "sampling_params.custom_params: expected `object | null`, got `str`"),
        ({"custom_params": {"a": {"b": [1]}}}, {}, "sampling_params.custom_params: expected"),
        ({}, {"return_logprob": "yes"}, "return_logprob: expected `bool`, got `str`"),
        ({}, {"priority": 1.5}, "priority: expected `int | null`, got `float`"),
        ({}, {"rid": 5}, "rid: expected `str | null`, got `int`"),
        ({}, {"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides is not for clients"),
    ],
)
def test_types_that_a_scheduler_could_not_read_are_named(
    sampling: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        door.check_types(record(sampling, **fields))


def test_what_python_callers_may_give_is_let_in() -> None:
    door.check_types(record(positional_embed_overrides=PositionalEmbeds([torch.zeros(1, 4)], [0])))


def normalized(monkeypatch: pytest.MonkeyPatch, half: str | None = "decode", **fields: Any) -> GenerateReqInput:
    monkeypatch.setattr(insides, "pair_half", lambda: half)
    request = GenerateReqInput(**fields)
    request_checks._normalize(GenerateReqInput.normalize_batch_and_arguments, request)
    return request


def test_each_choice_between_two_servers_has_a_room_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one = normalized(monkeypatch, text="a", sampling_params={"n": 3, "top_k": 2}, bootstrap_room=70, rid="r")
    assert (one.text, one.bootstrap_room, one.parallel_sample_num) == (["a"] * 3, [70, 71, 72], 1)
    assert one.sampling_params == [{"n": 1, "top_k": 2}] * 3 and len(set(one.rid)) == 3
    two = normalized(
        monkeypatch,
        input_ids=[[1], [2, 3]],
        sampling_params={"n": 2},
        bootstrap_room=[70, 90],
        bootstrap_host=["a", "b"],
        rid=["r", "s"],
    )
    assert two.input_ids == [[1], [1], [2, 3], [2, 3]] and two.bootstrap_room == [70, 71, 90, 91]
    assert two.bootstrap_host == ["a", "a", "b", "b"] and len(set(two.rid)) == 4
    assert two[3].input_ids == [2, 3]


def test_one_server_makes_its_choices_as_sglang_does(monkeypatch: pytest.MonkeyPatch) -> None:
    request = normalized(monkeypatch, half=None, text="a", sampling_params={"n": 3})
    assert request.parallel_sample_num == 3


@pytest.mark.parametrize("n", [0, -1, 129, 10**12, "3", True, 1.5, [1]])
def test_a_number_of_choices_that_cannot_be(n: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdmissionError, match="must be a whole number of 1 to 128"):
        normalized(monkeypatch, text="a", sampling_params={"n": n})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text": "a", "rid": ["r"]}, r"rid=\['r'\] must be a text"),
        ({"input_ids": [[1], 5]}, "input_ids has 5 where a prompt's list"),
    ],
)
def test_prompts_that_sglang_could_not_take_apart(
    fields: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=sentence):
        normalized(monkeypatch, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"input_embeds": []}, {"text": "a", "sampling_params": [5]}, {"input_ids": 5}, {"text": ["a"], "lora_path": []}],
)
def test_what_sglang_cannot_read_is_a_bad_request(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not have the form that it should"):
        normalized(monkeypatch, **fields)
