"""Targets: `PrefillBootstrapQueue.create_sender`; `send_kv_chunk` and `_retire_aborted_prefill_result` of
`SchedulerDisaggregationPrefillMixin`. Reason: the transfer must know which of a sparse prompt's pages this rank holds,
and carries to the decode server how it was prefilled, or why it was refused.

    created       which pages this rank ships: from the prompt's length alone, as SGLang sends a cached prefix before
                  the prompt's own batch
    computed      `patches/prefill_forward.py` asks for a sparse prompt's `layer_stream`, by which layers leave early
    last pages    the report, which goes with them
    given up      the reason

Official point tried: SGLang's KV senders are told pages, not requests.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches import batches, insides
from sglang_apb.patches._patch import Patch

from sglang_apb.transfer.prefill.layer_stream import LayerStream


def layer_stream(batch: Any) -> LayerStream | None:
    """Sends the layers of the batch's one sparse prompt; None when nothing can be sent before the prefill ends."""
    (req,) = batch.reqs
    sender = insides.sender_of(req)
    if sender is None or insides.waits_for_decode(req):
        return None
    page_size = batch.token_to_kv_pool_allocator.page_size
    return LayerStream(sender, batches.unsent_row(batch, req)[::page_size], page_size)


def _tell_owned_pages(result: bool, self: Any, req: Any, num_kv_heads: int) -> None:
    sender, owned = insides.sender_of(req), insides.notes_of(req).owned_pages
    if sender is not None and owned is not None:
        sender.set_owned_pages(owned)


def _tell_report(self: Any, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
    report = insides.notes_of(req).report
    if not last_chunk or report is None:
        return
    insides.tell_client(req, report)  # in this server's own answer, which the router does not pass on
    sender = insides.sender_of(req)
    if sender is not None:
        # The wire carries whole numbers and short texts.
        sender.set_prefill_info({k: v if isinstance(v, int) else str(v) for k, v in report.items()})


def _tell_reason(self: Any, req: Any) -> None:
    """SGLang ends the transfer of a prompt that it refused, or whose client went away, without saying why."""
    sender, reason = insides.sender_of(req), insides.why_aborted(req)
    if sender is not None and reason is not None:
        sender.refuse(reason)


_PREFILL = "sglang.srt.disaggregation.prefill"
PATCHES = (
    Patch(
        f"{_PREFILL}.PrefillBootstrapQueue.create_sender", "after", ("self", "req", "num_kv_heads"), _tell_owned_pages
    ),
    Patch(
        f"{_PREFILL}.SchedulerDisaggregationPrefillMixin.send_kv_chunk",
        "before",
        ("self", "req", "last_chunk", "end_idx"),
        _tell_report,
    ),
    Patch(
        f"{_PREFILL}.SchedulerDisaggregationPrefillMixin._retire_aborted_prefill_result",
        "before",
        ("self", "req"),
        _tell_reason,
    ),
)
