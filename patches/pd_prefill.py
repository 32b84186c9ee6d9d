"""Target: `SchedulerDisaggregationPrefillMixin.send_kv_chunk`. Reason: the transfer must know which of a sparse
prompt's pages this rank holds, and carries to the decode server how it was prefilled, or why it was refused.

`patches/prefill_forward.py` asks here for a sparse prompt's `layer_stream`: its layers are sent before that.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches._patch import Patch

from sglang_apb.requests import PARAMETER
from sglang_apb.transfer.layer_stream import LayerStream


def layer_stream(batch: Any) -> LayerStream | None:
    """Sends the layers of the batch's one sparse prompt; None when nothing can be sent before the prefill ends."""
    (req,) = batch.reqs
    sender = getattr(req, "disagg_kv_sender", None)
    if not hasattr(sender, "stream_layer") or req.pending_bootstrap:
        return None
    _tell_sender(req)
    page_size = batch.token_to_kv_pool_allocator.page_size
    row = batch.req_to_token_pool.req_to_token[req.req_pool_idx, req.start_send_idx : len(req.origin_input_ids)]
    return LayerStream(sender, row[::page_size], page_size)


def _before_send(self: Any, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
    if getattr(req, "prefill_report", None):
        # For this server's own answer, which the router does not pass on. SGLang takes it from decoding steps only.
        req.customized_info = {PARAMETER: [req.prefill_report]}
    _tell_sender(req)


def _tell_sender(req: Any) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    sender = req.disagg_kv_sender
    if not hasattr(sender, "set_owned_pages") or getattr(req, "told_sender", None) is sender:
        return
    req.told_sender = sender
    ended = req.finished_reason or req.to_finish
    if isinstance(ended, FINISH_ABORT):
        # A prompt that was refused (SGLang has run a single token in its place), or whose client went away.
        sender.refuse(ended.message)
        return
    # The wire carries whole numbers and short texts.
    sender.set_prefill_info({k: v if isinstance(v, int) else str(v) for k, v in req.prefill_report.items()})
    if req.sparse_pages is not None:
        sender.set_owned_pages(req.sparse_pages)


PATCHES = (
    Patch(
        "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk",
        "before",
        ("self", "req", "last_chunk", "end_idx"),
        _before_send,
    ),
)
