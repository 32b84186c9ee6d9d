"""Targets: `Scheduler._add_request_to_queue`, `Req._compute_max_prefix_len`, `PrefillAdder.add_one_req`.

Reason: a sparse prompt is laid out as a whole. It runs alone in its batch and in one piece, and its KV depends on
its question, so no other request may find it in the radix cache, nor it another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_apb.patches._patch import Patch
from sglang_apb.patches.prefill_forward import backend_of

from sglang_apb import capacity, config, requests
from sglang_apb.backends.base import KeptTokens
from sglang_apb.layout import LayoutError


def _decide(self: Any, req: Any, is_retracted: bool = False) -> None:
    """Marks the request once, before any queue sees it.

    `req.sparse_wish`: None for the exact path. `req.kept_tokens`: what of its KV this rank keeps, None for all of it.
    """
    if is_retracted or hasattr(req, "sparse_wish"):
        return
    req.sparse_wish = req.kept_tokens = None
    if req.finished() or req.to_finish:
        return
    backend = backend_of(self.tp_worker.model_runner)
    options = self.server_args.plugin_options
    shortest = config.parse(options.config_text).shortest_sparse(self.server_args.device, options.sp_size)
    wish = requests.wish_of(req, shortest)
    kept = None
    if wish is not None:
        try:
            kept = backend.kept_tokens(backend.plan(len(req.origin_input_ids), wish))
        except LayoutError:  # shorter than a question and a page of context
            wish = None
    if backend.keeps_parts and (error := _find_lack_of_slots(self, req, kept)):
        req.set_finish_with_abort(error)
        return
    req.sparse_wish, req.kept_tokens = wish, kept
    if wish is not None:
        req.skip_radix_cache_insert = True


def _find_lack_of_slots(scheduler: Any, req: Any, kept: KeptTokens | None) -> str:
    """A sentence when the prompt can never have its KV slots: SGLang's own check knows one number for all prompts."""
    num_slots, num_tokens = scheduler.max_total_num_tokens, len(req.origin_input_ids)
    if capacity.Room(num_slots, scheduler.page_size).fits(num_tokens if kept is None else kept.num_slots):
        return ""
    return (
        f"The prompt of {num_tokens} tokens does not fit in the {num_slots} KV slots of a rank: exact attention keeps "
        f"every token on every rank; give a shorter prompt, or let it run sparse."
        if kept is None
        else f"The prompt of {num_tokens} tokens needs {kept.num_slots} of the {num_slots} KV slots of a rank: "
        f"give a shorter prompt."
    )


def _is_sparse(req: Any) -> bool:
    return getattr(req, "sparse_wish", None) is not None


def _no_shared_prefix(original: Any, self: Any, input_len: int) -> int:
    return 0 if _is_sparse(self) else original(self, input_len)


def _add_alone_and_whole(
    original: Any, self: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None
) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    if any(map(_is_sparse, self.can_run_list)) or (_is_sparse(req) and self.can_run_list):
        return AddReqResult.OTHER
    if not _is_sparse(req):
        return original(self, req, has_chunked_req, truncation_align_size)
    with _without_chunks(self), _charging_kept_tokens_only(self, req):
        return original(self, req, has_chunked_req, truncation_align_size)


@contextmanager
def _without_chunks(adder: Any) -> Iterator[None]:
    chunk, adder.rem_chunk_tokens = adder.rem_chunk_tokens, None
    try:
        yield
    finally:
        adder.rem_chunk_tokens = chunk


@contextmanager
def _charging_kept_tokens_only(adder: Any, req: Any) -> Iterator[None]:
    """SGLang counts the whole prompt against the pool's free space; tokens that other ranks keep take none here."""
    num_elsewhere = 0 if req.kept_tokens is None else req.kept_tokens.num_elsewhere
    adder.rem_total_token_offset -= num_elsewhere
    adder.cur_rem_token_offset -= num_elsewhere
    yield
    if req not in adder.can_run_list:
        adder.rem_total_token_offset += num_elsewhere
        adder.cur_rem_token_offset += num_elsewhere


PATCHES = (
    Patch(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        "before",
        ("self", "req", "is_retracted"),
        _decide,
    ),
    Patch(
        "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len",
        "around",
        ("self", "input_len"),
        _no_shared_prefix,
    ),
    Patch(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "around",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
        _add_alone_and_whole,
    ),
)
