"""Target: `SchedulerDisaggregationPrefillMixin.send_kv_chunk`. Reason: the transfer must know which of a sparse
prompt's pages this rank holds, and carries to the decode server how it was prefilled, or why it was refused.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches._patch import Patch


def _tell_sender(self: Any, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
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
        _tell_sender,
    ),
)
