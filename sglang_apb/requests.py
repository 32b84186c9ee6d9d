"""Which requests run sparse, and with what wishes. Pure decisions on a request's data, the same on every rank."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_apb import layout
from sglang_apb.backends.base import Wish
from sglang_apb.backends.handed_on import HandedOn
from sglang_apb.config import ApbConfig
from sglang_apb.own_slots import OwnSlots
from sglang_apb.rounds import Rounds

# The key of a request's `custom_params` that speaks to us: {"prefill": {"question_tokens": 300, "exact": false}}
PARAMETER = "prefill"
_KNOWN = ("question_tokens", "exact")
# In a request's `extra_key`, between what its client sent and what we add; so clients may not send it.
MARK = "\0"


class RequestError(ValueError):
    """A request asks for what cannot be done; the text names the value and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """What the decisions need to know of a request (`patches/insides.py` reads it)."""

    num_tokens: int
    num_output_tokens: int  # a retracted request prefills its output too
    custom_params: Mapping[str, Any] | None
    needs_every_row: bool  # hidden states, own embeddings, a session
    first_logprob: int | None = None  # the first token whose row has to give a logprob, if any


@dataclass
class Notes:
    """What is noted on a request, from its arrival on."""

    is_decided: bool = False
    wish: Wish | None = None  # None: the exact path
    rounds: Rounds | None = None  # where a sparse prompt may be cut; None: it runs in one piece
    handed_on: HandedOn = field(default_factory=HandedOn)  # from round to round
    context_end: int | None = None  # of a sparse prompt whose context others may find in the radix cache
    own_slots: OwnSlots | None = None  # what this rank keeps of its KV, with others; None: every token
    digests: array[int] | None = None  # of the units of `own_slots` (patches/unit_cache.py)
    owned_pages: list[tuple[int, int]] | None = None  # what this rank ships; None: SGLang's split
    report: dict[str, Any] | None = None  # how it was prefilled, for the answer

    def round_end(self, start: int) -> int | None:
        """Where the round ends that computes a sparse prompt from token `start` on; None: at the prompt's end."""
        return None if self.rounds is None else self.rounds.end_of(start)


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


def wish_of(prompt: Prompt, shortest_sparse: int) -> Wish | None:
    """What the sparse prefill should know of the request; None when it takes the exact path.

    Exact are: prompts of less than `shortest_sparse` tokens, prompts that ask for it, and those that want something of
    every row (hidden states) or bring their own embeddings or session. Input logprobs come with a sparse prefill where
    the request says that these tokens are its question.
    """
    given = parameters_of(prompt.custom_params)
    if prompt.num_tokens < shortest_sparse or given.get("exact") or prompt.needs_every_row:
        return None
    asked = given.get("question_tokens")
    if prompt.first_logprob is not None and prompt.first_logprob < prompt.num_tokens - (asked or 0):
        return None
    return Wish(question_tokens=asked)


def question_tokens(prompt: Prompt, wish: Wish, config: ApbConfig) -> int | None:
    """How many trailing tokens ask. A retracted request's output belongs to the question."""
    if prompt.num_output_tokens == 0:
        return wish.question_tokens
    asked = wish.question_tokens or layout.num_question_tokens(prompt.num_tokens, config)
    return asked + prompt.num_output_tokens
