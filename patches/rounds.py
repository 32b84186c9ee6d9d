"""Targets: `Scheduler.get_prefill_adder_class`, `Scheduler._get_new_batch_prefill_raw`.

Reason: a sparse prompt runs alone in its batch, and where it is long in rounds that end on its blocks; between two
rounds others get a turn. SGLang's chunked prefill carries it from round to round.

    round -> decodes, one step -> other prompts, up to so many tokens -> round -> ...

Other prompts are those that fit whole into what is left of their turn, and into a chunk of SGLang's where they are
exact; what does not fit waits, in its order. While a prompt is between its rounds the slots that it will need are kept
for it.
Official point: `get_prefill_adder_class` is SGLang's own override point. Options tried: `--schedule-policy
shortest-prefill-first` puts others into the long prompt's batch and lets it starve, `--prefill-decode-interval` does
nothing on a prefill server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from sglang_apb.patches import batches, insides
from sglang_apb.patches._patch import Patch

from sglang_apb import config
from sglang_apb.layout import Span

# A turn of others ends after so many batches, however small: each takes a launch, and decodes a step.
MOST_PASSES = 8
# Waiting prompts that a pass looks at in vain: SGLang matches each with the cache.
MOST_SKIPPED = 16


@dataclass
class Turns:
    """Between two rounds of a long prompt. `limit`, `left`: tokens of others."""

    limit: int
    left: int = 0
    decodes_are_due: bool = False

    def begin(self) -> None:
        """A round has been formed."""
        self.left, self.decodes_are_due = self.limit, True


def _turns_of(scheduler: Any) -> Turns:
    turns = getattr(scheduler, "prefill_turns", None)
    if turns is None:
        options = insides.options_of(scheduler.server_args)
        turns = scheduler.prefill_turns = Turns(config.parse(options.config_text).between_rounds)
    return turns  # type: ignore[no-any-return]


def _is_sparse(req: Any) -> bool:
    return insides.notes_of(req).wish is not None


def _use_our_adder(original: Any, self: Any) -> Any:
    return partial(_adder_class(original(self)), _turns_of(self))


@cache
def _adder_class(base: Any) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    class RoundsAdder(base):  # type: ignore[misc]
        """Forms the next prefill batch: a round of a long prompt, or others."""

        def __init__(self, turns: Turns, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._turns = turns
            self._parked: Any = None  # the prompt that waits for its next round
            self._num_skipped = 0

        def add_chunked_req(self, req: Any) -> Any:
            """The request while it has rounds to come."""
            if not _is_sparse(req):
                return super().add_chunked_req(req)
            num_tokens = _round_tokens(req) or batches.num_new_tokens(req)
            if self._turns.left or not batches.has_slots(self, _num_slots(req, num_tokens)):
                self._park(req)
                return req
            with batches.chunk_of(self, num_tokens), _charging_slots(self, req):
                req = super().add_chunked_req(req)
            self.rem_chunk_tokens = 0
            return req

        def _park(self, req: Any) -> None:
            self._parked = req
            self.rem_chunk_tokens = min(self.rem_chunk_tokens or self._turns.left, self._turns.left)
            batches.charge(self, _num_slots(req, batches.num_new_tokens(req)) + self.page_size)

        def _fits_whole(self, req: Any) -> bool:
            """Into what is left of the others' turn. SGLang knows one request with chunks to come."""
            num_tokens = self.ceil_paged_tokens(batches.num_new_tokens(req))
            if _is_sparse(req):
                return num_tokens <= self._turns.left and _round_tokens(req) is None
            return bool(num_tokens <= self.rem_chunk_tokens)

        def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> Any:
            others = batches.admitted(self)
            if any(map(_is_sparse, others)) or (_is_sparse(req) and others):
                return AddReqResult.OTHER
            if self._parked is not None and not self._fits_whole(req):
                self._num_skipped += 1  # the next one may be shorter
                return AddReqResult.CONTINUE if self._num_skipped < MOST_SKIPPED else AddReqResult.OTHER
            if not _is_sparse(req):
                return super().add_one_req(req, has_chunked_req, truncation_align_size)
            with batches.chunk_of(self, _round_tokens(req)), _charging_slots(self, req):
                return super().add_one_req(req, has_chunked_req, None)

    return RoundsAdder


def _round_tokens(req: Any) -> int | None:
    """Of the sparse prompt's next round; None where it computes all the rest."""
    start = batches.num_computed(req)
    end = insides.notes_of(req).round_end(start)
    return None if end is None else end - start


def _num_slots(req: Any, num_tokens: int) -> int:
    """Slots that the request's next tokens take on this rank."""
    own, start = insides.notes_of(req).own_slots, batches.num_computed(req)
    return num_tokens if own is None else own.num_of(Span(start, start + num_tokens))


@contextmanager
def _charging_slots(adder: Any, req: Any) -> Iterator[None]:
    """SGLang counts all of the prompt's tokens that are left against the pool's free space; those that other ranks keep
    take none here.
    """
    num_tokens = batches.num_new_tokens(req)
    num_elsewhere = num_tokens - _num_slots(req, num_tokens)
    batches.charge(adder, -num_elsewhere)
    yield
    if req not in batches.admitted(adder):
        batches.charge(adder, num_elsewhere)


def _take_turns(original: Any, self: Any, prefill_delayer_single_pass: Any, running_batch: Any) -> Any:
    """SGLang's next prefill batch, and the running one."""
    turns, long = _turns_of(self), batches.chunked_prompt(self)
    if long is None or not _is_sparse(long):
        turns.left = 0
    elif batches.give_up_if_failed(self, long):
        return None, running_batch
    elif turns.decodes_are_due and batches.may_decode(self, running_batch):
        turns.decodes_are_due = False
        return None, running_batch
    batch, running_batch = original(self, prefill_delayer_single_pass, running_batch)
    if batch is None and turns.left:  # there was nobody
        turns.left = 0
        batch, running_batch = original(self, prefill_delayer_single_pass, running_batch)
    if batch is not None:
        _count(self, turns, batch)
    return batch, running_batch


def _count(scheduler: Any, turns: Turns, batch: Any) -> None:
    long = batches.chunked_prompt(scheduler)
    if long is None or not _is_sparse(long):
        return
    if long in batch.reqs:
        turns.begin()
        return
    batches.count_no_chunk(batch, long)
    turns.left = max(turns.left - max(sum(batch.extend_lens), turns.limit // MOST_PASSES), 0)
    turns.decodes_are_due = True


PATCHES = (
    Patch("sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class", "around", ("self",), _use_our_adder),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        "around",
        ("self", "prefill_delayer_single_pass", "running_batch"),
        _take_turns,
    ),
)
