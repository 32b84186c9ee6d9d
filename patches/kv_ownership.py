"""Targets: `alloc_for_extend`, `release_kv_cache`, `PrefillBootstrapQueue._check_if_req_exceed_kv_capacity`.

Reason: SGLang's ranks each hold a prompt's whole KV. On a prefill server whose ranks ship what they own, a rank
needs slots for that part only, and R ranks hold prompts of R times the length (patches/prompt_memory.py).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_apb.patches._patch import Patch

from sglang_apb.backends.base import PADDING_SLOT, KeptTokens


def _kept_tokens(batch: Any) -> KeptTokens | None:
    """None as well for a prompt that SGLang batched or cut after all: it runs exact, and needs every slot."""
    kept = getattr(batch.reqs[0], "kept_tokens", None) if len(batch.reqs) == 1 else None
    return kept if kept is not None and batch.extend_lens[0] == kept.num_tokens else None


def _allocate(original: Any, batch: Any) -> Any:
    """SGLang's allocation for a prompt of which this rank keeps a part: slots, and the request's row of the table."""
    kept = _kept_tokens(batch)
    if kept is None:
        return original(batch)
    from sglang.srt.managers.schedule_batch import ReqKvInfo
    from sglang.srt.mem_cache.allocation import alloc_req_slots

    (req,) = batch.reqs
    indices = torch.tensor(alloc_req_slots(batch.req_to_token_pool, batch.reqs, batch.tree_cache), dtype=torch.int64)
    req.kept_slots = _take_slots(batch.tree_cache, kept.num_slots)
    row = _row(kept, req.kept_slots)
    batch.req_to_token_pool.write((int(indices[0]), slice(0, kept.num_tokens)), row.to(torch.int32))
    req.kv = ReqKvInfo(kv_allocated_len=kept.num_tokens, swa_evicted_seqlen=0)
    return row, indices.to(batch.device, non_blocking=True), indices


def _take_slots(tree_cache: Any, num_slots: int) -> torch.Tensor:
    """Whole pages with at least `num_slots` slots, int64. Raises RuntimeError when the pool is full, as SGLang does."""
    from sglang.srt.mem_cache.common import available_and_evictable_str, evict_from_tree_cache

    allocator = tree_cache.token_to_kv_pool_allocator
    num_slots = -(-num_slots // allocator.page_size) * allocator.page_size
    evict_from_tree_cache(tree_cache, num_slots)
    slots = allocator.alloc(num_slots)
    if slots is None:
        raise RuntimeError(f"no {num_slots} free KV slots: {available_and_evictable_str(tree_cache)}")
    return slots


def _row(kept: KeptTokens, slots: torch.Tensor) -> torch.Tensor:
    """The slot of each of the prompt's tokens, int64 [num_tokens]; PADDING_SLOT for those that another rank keeps."""
    row = torch.full((kept.num_tokens,), PADDING_SLOT, dtype=torch.int64, device=slots.device)
    start = 0
    for span in kept.context:
        row[span.start : span.end] = slots[start : start + len(span)]
        start += len(span)
    row[kept.question.start :] = slots[kept.num_context : kept.num_slots]
    return row


def _release(original: Any, req: Any, tree_cache: Any, is_insert: bool = True) -> None:
    """Frees the context's slots, spare ones included; the question's stand in the table, where SGLang finds them."""
    slots = getattr(req, "kept_slots", None)
    if slots is not None and req.req_pool_idx is not None:
        kept = req.kept_tokens
        tree_cache.token_to_kv_pool_allocator.free_segment(slots[: kept.num_context], start_pos=0)
        req.kept_slots = None
        req.cache_protected_len = kept.question.start  # SGLang leaves alone what stands before
    original(req, tree_cache, is_insert)


def _exceeds_capacity(original: Any, self: Any, req: Any) -> bool:
    """Compares tokens with one rank's slots; a prompt that is kept in parts was compared when it came."""
    return getattr(req, "kept_tokens", None) is None and original(self, req)


PATCHES = (
    Patch("sglang.srt.mem_cache.allocation.alloc_for_extend", "around", ("batch",), _allocate),
    Patch("sglang.srt.mem_cache.common.release_kv_cache", "around", ("req", "tree_cache", "is_insert"), _release),
    Patch(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._check_if_req_exceed_kv_capacity",
        "around",
        ("self", "req"),
        _exceeds_capacity,
    ),
)
