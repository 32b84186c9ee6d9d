"""What a request may ask for: each field by which one request could end a scheduler, or wait in it for ever.

Checked in the process that answers clients, and alike on prefill and decode servers: what only one of them refused
would leave the other waiting. So nothing here depends on settings that may differ between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_apb import stop_patterns
from sglang_apb.requests import MARK
from sglang_apb.transfer.protocol.room_number import ROOMS

# What SGLang's buffers between prefill and decode hold of a first token (disaggregation/utils.py, MetadataBuffers).
MAX_LOGPROBS_DISAGGREGATED = 128
# OpenAI's own bound; each choice is a request of its own.
MAX_CHOICES = 128
_INT32 = 2**31 - 1
# By which SGLang's health check and warm-up ask one half alone (disaggregation/utils.py, FAKE_BOOTSTRAP_HOST). Prefill
# sends nothing then; decode fetches nothing, and would go on from what its pages hold of others' prompts.
_SELF_TEST_HOST, _SELF_TEST_TOKENS = "2.2.2.2", 4
# Of SGLang's sampling parameters: in int32 and float32 tensors these neither overflow nor make a probability NaN.
_SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 1e4),
    "repetition_penalty": (0.01, 2),
    "top_k": (1, 2**30),
    "min_new_tokens": (0, _INT32),
    "max_new_tokens": (0, _INT32),
    "stream_interval": (1, _INT32),
}
_MAX_BIAS = 1e6
# What SGLang's own processes tell each other in a request.
_INTERNAL = ("http_worker_ipc", "need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls")


class AdmissionError(ValueError):
    """A request asks for what the server cannot do; the text names the value, the range and the remedy."""


@dataclass(frozen=True)
class Limits:
    """Of the model, and of which half of a prefill/decode pair ("prefill", "decode") the server is."""

    vocab_size: int
    hidden_size: int
    half: str | None = None


def check_num_choices(n: Any) -> None:
    """Of `n`, before SGLang makes so many requests of one. Raises AdmissionError."""
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES):
        raise AdmissionError(f"n={n!r} must be a whole number of 1 to {MAX_CHOICES}")


def check(asked: Any, limits: Limits) -> None:
    """`asked`: SGLang's TokenizedGenerateReqInput, of the types that it declares. Raises AdmissionError.

    Of an answer, stop patterns get its end only from here on.
    """
    num_tokens = len(asked.input_ids if asked.input_ids is not None else asked.input_embeds or ())
    if limits.half:
        _check_disaggregated(asked, num_tokens, limits.half)
    if asked.input_ids is not None:
        _check_token_ids("input_ids", asked.input_ids, limits.vocab_size)
    if asked.session_params is None and num_tokens == 0:
        raise AdmissionError("the prompt has no tokens: give at least one")
    _check_embeds(asked.input_embeds, limits.hidden_size)
    _check_internal(asked)
    if MARK in (asked.extra_key or ""):
        raise AdmissionError(f"extra_key={asked.extra_key!r} has a zero byte, which is ours: leave it out")
    _check_sampling(asked.sampling_params, limits.vocab_size)
    _check_logprobs(asked, num_tokens, limits)
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        _check_all_in(name, getattr(asked, name) or (), range(num_tokens), "positions in the prompt")


def _check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    ids = np.asarray(token_ids, dtype=np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise AdmissionError(f"{name} has {outside[0]}, which is not among the model's tokens, 0 to {vocab_size - 1}")


def _check_all_in(name: str, numbers: Iterable[int], allowed: range, what: str) -> None:
    for number in numbers:
        if number not in allowed:
            raise AdmissionError(f"{name} has {number}: {what} are {allowed.start} to {allowed.stop - 1}")


def _check_embeds(embeds: Sequence[Sequence[float]] | None, hidden_size: int) -> None:
    for row in embeds or ():
        if len(row) != hidden_size:
            raise AdmissionError(f"input_embeds has a row of {len(row)} numbers, and the model takes {hidden_size}")
        if not all(map(math.isfinite, row)):
            raise AdmissionError("input_embeds has a number that is not finite: give finite ones")


def _check_internal(asked: Any) -> None:
    for name in _INTERNAL:
        if getattr(asked, name):
            raise AdmissionError(f"{name} is not for clients: leave it out")


def _check_sampling(sampling: Any, vocab_size: int) -> None:
    for name, (lowest, highest) in _SAMPLING_RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not lowest <= value <= highest:
            raise AdmissionError(f"{name}={value:g} must be {lowest:g} to {highest:g}")
    check_num_choices(sampling.n)
    _check_token_ids("stop_token_ids", list(sampling.stop_token_ids or ()), vocab_size)
    for token, bias in (sampling.logit_bias or {}).items():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise AdmissionError(f"logit_bias[{token}]={bias:g} must be {-_MAX_BIAS:g} to {_MAX_BIAS:g}")
    for pattern in sampling.stop_regex_strs:
        if fault := stop_patterns.find_fault(pattern):
            raise AdmissionError(f"stop_regex={pattern!r} {fault}: matching it may take for ever, write it without")
    # SGLang tries a pattern without a longest match on the whole answer.
    sampling.stop_regex_max_len = min(sampling.stop_regex_max_len, stop_patterns.TAIL_TOKENS)


def _check_logprobs(asked: Any, num_tokens: int, limits: Limits) -> None:
    most = min(limits.vocab_size, MAX_LOGPROBS_DISAGGREGATED) if limits.half else limits.vocab_size
    if not 0 <= asked.top_logprobs_num <= most:
        why = " when prefill and decode are two servers" if limits.half else ""
        raise AdmissionError(f"top_logprobs_num (logprobs) = {asked.top_logprobs_num} must be 0 to {most}{why}")
    if not -1 <= asked.logprob_start_len <= num_tokens:
        raise AdmissionError(
            f"logprob_start_len={asked.logprob_start_len} must be -1 to {num_tokens}, the prompt's length"
        )


def _check_disaggregated(asked: Any, num_tokens: int, half: str) -> None:
    """What SGLang's prefill and decode servers cannot do together."""
    refused: dict[str, Callable[[], bool]] = {
        "session_params": lambda: asked.session_params is not None,
        "input_embeds": lambda: asked.input_embeds is not None,
        "token_ids_logprob": lambda: bool(asked.token_ids_logprob),
        "return_hidden_states": lambda: bool(asked.return_hidden_states),
        "logprob_start_len with stream": lambda: (
            asked.stream and asked.return_logprob and 0 <= asked.logprob_start_len < num_tokens
        ),
    }
    for name, is_asked in refused.items():
        if is_asked():
            raise AdmissionError(f"{name} is not available when prefill and decode are two servers: leave it out")
    if asked.bootstrap_host == _SELF_TEST_HOST:
        if half == "decode" and num_tokens > _SELF_TEST_TOKENS:
            raise AdmissionError(f"bootstrap_host={_SELF_TEST_HOST} is for the server's own checks: give prefill's")
    elif asked.bootstrap_room is not None and asked.bootstrap_room not in ROOMS:
        raise AdmissionError(f"bootstrap_room={asked.bootstrap_room} must be 1 to 2^63 - 1, and new for every request")
    if asked.bootstrap_room is not None and not asked.bootstrap_host:
        raise AdmissionError("bootstrap_host is missing: give the prefill server's, as routers do")
    if asked.bootstrap_port is not None and not 0 < asked.bootstrap_port < 65536:
        raise AdmissionError(f"bootstrap_port={asked.bootstrap_port} must be 1 to 65535, or left out")
    if asked.disagg_prefill_dp_rank is not None and asked.disagg_prefill_dp_rank < 0:
        raise AdmissionError(f"disagg_prefill_dp_rank={asked.disagg_prefill_dp_rank} must be at least 0, or left out")
