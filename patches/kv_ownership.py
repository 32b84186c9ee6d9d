"""Targets: `alloc_for_extend`, `release_kv_cache`, `PrefillBootstrapQueue._check_if_req_exceed_kv_capacity`.

Reason: SGLang's ranks each hold a prompt's whole KV. On a prefill server whose ranks ship what they own, a rank
needs slots for that part only, and R ranks hold prompts of R times the length (patches/prompt_memory.py).
Official points tried: an allocator class of one's own sees numbers of tokens, not requests; SGLang's sharded KV stripes
exact prompts too, which these ranks keep whole.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch

from sglang_apb.backends.base import PADDING_SLOT, KeptTokens
from sglang_apb.layout import Span


def _kept_tokens(batch: Any) -> KeptTokens | None:
    """None as well for a prompt that SGLang batched or cut after all, which fails in its forward pass."""
    kept = insides.notes_of(batch.reqs[0]).kept
    return kept if kept is not None and insides.computed_tokens(batch) == Span(0, kept.num_tokens) else None


def _allocate(original: Any, batch: Any) -> Any:
    """SGLang's allocation for a prompt of which this rank keeps a part: slots, and the request's row of the table."""
    kept = _kept_tokens(batch)
    if kept is None:
        return original(batch)
    indices = insides.take_request_row(batch)
    slots = insides.take_slots(batch.tree_cache, kept.num_slots)
    row = _row(kept, slots)
    insides.write_request_row(batch, int(indices[0]), row)
    insides.notes_of(batch.reqs[0]).slots = slots
    return row, indices.to(batch.device, non_blocking=True), indices


def _row(kept: KeptTokens, slots: torch.Tensor) -> torch.Tensor:
    """The slot of each of the prompt's tokens, int64 [num_tokens]; PADDING_SLOT for those that another rank keeps."""
    row = torch.full((kept.num_tokens,), PADDING_SLOT, dtype=torch.int64, device=slots.device)
    start = 0
    for span in kept.context:
        row[span.start : span.end] = slots[start : start + len(span)]
        start += len(span)
    row[kept.question.start :] = slots[kept.num_context : kept.num_slots]
    return row


def _release(original: Any, req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    """Frees the context's slots, spare ones included; the question's stand in the table, where SGLang finds them."""
    notes = insides.notes_of(req)
    if notes.slots is not None and notes.kept is not None and insides.holds_kv(req):
        insides.free_slots(tree_cache, notes.slots[: notes.kept.num_context])
        notes.slots = None
        insides.protect_before(req, notes.kept.question.start)
    original(req, tree_cache, checkpoint=checkpoint)


def _exceeds_capacity(original: Any, self: Any, req: Any) -> bool:
    """Compares tokens with one rank's slots; a prompt that is kept in parts was compared when it came."""
    return insides.notes_of(req).kept is None and original(self, req)


PATCHES = (
    Patch("sglang.srt.mem_cache.allocation.alloc_for_extend", "around", ("batch",), _allocate),
    Patch("sglang.srt.mem_cache.common.release_kv_cache", "around", ("req", "tree_cache", "checkpoint"), _release),
    Patch(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._check_if_req_exceed_kv_capacity",
        "around",
        ("self", "req"),
        _exceeds_capacity,
    ),
)
