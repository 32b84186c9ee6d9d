"""Targets: `alloc_for_extend`, `PrefillBootstrapQueue._check_if_req_exceed_kv_capacity`.

Reason: SGLang's ranks each hold a prompt's whole KV. On a prefill server whose ranks ship what they own, a rank
needs slots for that part only, and R ranks hold prompts of R times the length (sglang_apb/own_slots.py). They are freed
in unit_cache.py. Official points tried: an allocator class of one's own sees numbers of tokens, not requests; SGLang's
sharded KV stripes exact prompts too, which these ranks keep whole.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches import batches, insides
from sglang_apb.patches._patch import Patch

from sglang_apb.layout import Span


def _allocate(original: Any, batch: Any) -> Any:
    """SGLang's allocation for a prompt of which this rank keeps a part: slots, and the request's row of the table."""
    notes, computed = insides.notes_of(batch.reqs[0]), batches.computed_tokens(batch)
    own = notes.own_slots
    if own is not None and (computed is None or computed.end != (notes.round_end(computed.start) or own.num_tokens)):
        own = notes.own_slots = None  # SGLang batched or cut it after all: it fails in its forward pass
    if own is None:
        return original(batch)
    (req,) = batch.reqs
    is_new, indices = not batches.holds_kv(req), batches.take_request_row(batch)
    row = int(indices[0])
    batch.tree_cache.hold(row, own)
    if is_new and computed.start:
        cached = batch.tree_cache.cached_slots(req)
        batches.write_request_row(batch, row, 0, cached[own.slots_of(Span(0, computed.start)).to(cached.device)])
    slots = batches.take_slots(batch.tree_cache, own.num_of(computed))
    places = own.slots_of(computed) - own.num_before(computed.start)
    taken = slots[places.to(slots.device)]
    batches.write_request_row(batch, row, computed.start, taken)
    return taken, indices.to(batch.device, non_blocking=True), indices


def _exceeds_capacity(original: Any, self: Any, req: Any) -> bool:
    """Compares tokens with one rank's slots; a prompt that is kept in parts was compared when it came."""
    return insides.notes_of(req).own_slots is None and original(self, req)


PATCHES = (
    Patch("sglang.srt.mem_cache.allocation.alloc_for_extend", "around", ("batch",), _allocate),
    Patch(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._check_if_req_exceed_kv_capacity",
        "around",
        ("self", "req"),
        _exceeds_capacity,
    ),
)
