"""Which requests run sparse, and with what wishes. Pure decisions on a request's data, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_apb import layout
from sglang_apb.backends.base import Wish
from sglang_apb.config import ApbConfig

# The key of a request's `custom_params` that speaks to us: {"prefill": {"question_tokens": 300, "exact": false}}
PARAMETER = "prefill"
_KNOWN = ("question_tokens", "exact")


class RequestError(ValueError):
    """A request asks for what cannot be done; the text names the value and the remedy."""


def parameters_of(custom_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The request's own wishes, checked. Raises RequestError."""
    given = (custom_params or {}).get(PARAMETER) or {}
    if not isinstance(given, Mapping):
        raise RequestError(f"custom_params[{PARAMETER!r}] must be an object such as {{'exact': true}}, not {given!r}")
    for key, value in given.items():
        if key not in _KNOWN:
            raise RequestError(f"unknown key {key!r} in custom_params[{PARAMETER!r}]; known: {', '.join(_KNOWN)}")
        if key == "exact" and not isinstance(value, bool):
            raise RequestError(f"custom_params[{PARAMETER!r}]['exact'] must be true or false, not {value!r}")
        if key == "question_tokens" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RequestError(
                f"custom_params[{PARAMETER!r}]['question_tokens'] must be a whole number of at least 1, not {value!r}"
            )
    return dict(given)


def check(num_tokens: int, custom_params: Mapping[str, Any] | None, page_size: int) -> None:
    """Raises RequestError for wishes that a prompt of `num_tokens` cannot meet, whatever the server's settings.

    Prefill and decode servers must agree: a request that only one of them refuses leaves the other waiting.
    """
    asked = parameters_of(custom_params).get("question_tokens")
    if asked is not None and asked > num_tokens - page_size:
        raise RequestError(
            f"question_tokens={asked} leaves no context in a prompt of {num_tokens} tokens: "
            f"give at most {max(num_tokens - page_size, 1)}, or leave it out"
        )


def wish_of(req: Any, shortest_sparse: int) -> Wish | None:
    """What the sparse prefill should know of SGLang's request `req`; None when it takes the exact path.

    Exact are: prompts of less than `shortest_sparse` tokens, prompts that ask for it, and those that want something of
    every row (input logprobs, hidden states) or bring their own embeddings or session.
    """
    num_tokens = len(req.origin_input_ids)
    given = parameters_of(req.sampling_params.custom_params)
    if num_tokens < shortest_sparse or given.get("exact") or _needs_every_row(req):
        return None
    return Wish(question_tokens=given.get("question_tokens"))


def question_tokens(req: Any, wish: Wish, config: ApbConfig) -> int | None:
    """How many trailing tokens ask. A retracted request prefills its output too: that belongs to the question."""
    num_output_tokens = len(req.output_ids)
    if num_output_tokens == 0:
        return wish.question_tokens
    asked = wish.question_tokens or layout.num_question_tokens(len(req.origin_input_ids), config)
    return asked + num_output_tokens


def _needs_every_row(req: Any) -> bool:
    wants_input_logprobs = req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)
    return bool(
        wants_input_logprobs
        or req.return_hidden_states
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None
        or req.multi_item_delimiter_indices is not None
        or req.session is not None
    )
