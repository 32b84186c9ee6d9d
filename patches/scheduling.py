"""Targets: `Scheduler._add_request_to_queue`, `Req._compute_max_prefix_len`, `PrefillAdder.add_one_req`.

Reason: a sparse prompt is laid out as a whole. It runs alone in its batch and in one piece, and its KV depends on
its question, so no other request may find it in the radix cache, nor it another's.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches._patch import Patch

from sglang_apb import config, requests


def _decide(self: Any, req: Any, is_retracted: bool = False) -> None:
    """Marks the request once, before any queue sees it: `req.sparse_wish`, None for the exact path."""
    if is_retracted or hasattr(req, "sparse_wish"):
        return
    options = config.parse(self.server_args.prefill_options.config_text)
    req.sparse_wish = None if req.finished() or req.to_finish else requests.wish_of(req, options)
    if req.sparse_wish is not None:
        req.skip_radix_cache_insert = True


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
    chunk, self.rem_chunk_tokens = self.rem_chunk_tokens, None
    try:
        return original(self, req, has_chunked_req, truncation_align_size)
    finally:
        self.rem_chunk_tokens = chunk


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
