"""What hooks read and write of SGLang's batches, of the budget by which it forms them, and of KV slots.

Beside `insides.py`, which has requests, ranks and options: named here and nowhere else in the hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang_apb.patches import insides

from sglang_apb.layout import Span

# ---- batches and the prefill's budget ------------------------------------------------------------


def is_prefill(batch: Any, model_runner: Any) -> bool:
    return bool(batch.forward_mode.is_extend() and not model_runner.is_draft_worker)


def computed_tokens(batch: Any) -> Span | None:
    """What the batch computes of its one request; None when it has several."""
    if len(batch.reqs) != 1:
        return None
    return Span(int(batch.prefix_lens[0]), int(batch.prefix_lens[0] + batch.extend_lens[0]))


def num_prefills_ended(batch: Any) -> int:
    """Prompts whose last token is in this batch. A retracted request prefills what it had generated, too."""
    of_reqs = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    return sum(cached + new == len(req.origin_input_ids) + len(req.output_ids) for req, cached, new in of_reqs)


def admitted(adder: Any) -> list[Any]:
    """Requests that are in the batch which SGLang's PrefillAdder is making."""
    return adder.can_run_list  # type: ignore[no-any-return]


@contextmanager
def chunk_of(adder: Any, num_tokens: int | None) -> Iterator[None]:
    """Within it SGLang cuts a prompt after so many tokens; None: it does not."""
    chunk, adder.rem_chunk_tokens = adder.rem_chunk_tokens, num_tokens
    try:
        yield
    finally:
        adder.rem_chunk_tokens = chunk


def num_new_tokens(req: Any) -> int:
    """Tokens of the request that are to be computed yet; it has been matched with the cache."""
    return len(req.full_untruncated_fill_ids) - int(req.prefix_len)


def num_computed(req: Any) -> int:
    """Tokens of the request that are computed or cached."""
    return int(req.prefix_len)


def has_slots(adder: Any, num_tokens: int) -> bool:
    """Whether the pool has them for a prompt that is being prefilled, those included that the cache would free."""
    return bool(num_tokens + adder.page_size <= adder.memory_budget.remaining_total)


def chunked_prompt(scheduler: Any) -> Any:
    """The request that is between two of its chunks, or None."""
    return scheduler.chunked_req


def count_no_chunk(batch: Any, req: Any) -> None:
    """SGLang has counted a chunk of the request for a batch that has none: it would drop its last token, too. And the
    batch, whose requests may decode for long, would hold the request.
    """
    req.inflight_middle_chunks -= 1
    batch.chunked_req = None


def give_up_if_failed(scheduler: Any, req: Any) -> bool:
    """Whether the request between two chunks was discarded. It then ends before the next pass."""
    if (reason := req.discard_output_reason) is None:
        return False
    if (sender := insides.sender_of(req)) is not None:
        sender.refuse(reason.message)
    scheduler._pending_chunked_abort_req = req
    return True


def may_decode(scheduler: Any, running_batch: Any) -> bool:
    """Whether requests decode that SGLang gives no turn of their own between chunks (`--prefill-decode-interval`)."""
    return bool(
        not running_batch.is_empty()
        and not running_batch.is_prefill_only
        and scheduler.prefill_decode_interval == 0
        and insides.pair_half() is None
    )


def charge(adder: Any, num_tokens: int) -> None:
    """Takes `num_tokens` (negative: gives them back) from the pool's free space as the adder counts it."""
    adder.memory_budget.total_offset += num_tokens
    adder.memory_budget.current_offset += num_tokens


# ---- KV slots ------------------------------------------------------------------------------------


def take_request_row(batch: Any) -> torch.Tensor:
    """Rows of the table of slots for the batch's requests, int64 on the host."""
    from sglang.srt.mem_cache.allocation import alloc_req_slots

    return torch.tensor(alloc_req_slots(batch.req_to_token_pool, batch.reqs, batch.tree_cache), dtype=torch.int64)


def write_request_row(batch: Any, row: int, start: int, slots: torch.Tensor) -> None:
    """`slots`: of the batch's one request, from token `start` on. They count as allocated and computed."""
    end = start + len(slots)
    batch.req_to_token_pool.write((row, slice(start, end)), slots.to(torch.int32))
    (req,) = batch.reqs
    req.kv.kv_allocated_len = req.kv.kv_committed_len = end


def unsent_row(batch: Any, req: Any) -> torch.Tensor:
    """The slots of the request's tokens [those that were sent, the batch's end), int32 on the device."""
    table = batch.req_to_token_pool.req_to_token
    return table[req.kv.req_pool_idx, req.start_send_idx : req.extend_end]  # type: ignore[no-any-return]


def take_slots(tree_cache: Any, num_slots: int) -> torch.Tensor:
    """Whole pages with at least `num_slots` slots, int64. Raises RuntimeError when the pool is full, as SGLang does."""
    from sglang.srt.mem_cache.common import available_and_evictable_str, evict_from_tree_cache

    allocator = tree_cache.token_to_kv_pool_allocator
    num_slots = -(-num_slots // allocator.page_size) * allocator.page_size
    evict_from_tree_cache(tree_cache, num_slots)
    slots = allocator.alloc(num_slots)
    if slots is None:
        raise RuntimeError(f"no {num_slots} free KV slots: {available_and_evictable_str(tree_cache)}")
    return slots  # type: ignore[no-any-return]


def free_slots(tree_cache: Any, slots: torch.Tensor) -> None:
    """Gives back whole pages."""
    tree_cache.token_to_kv_pool_allocator.free_segment(slots, start_pos=0)


def holds_kv(req: Any) -> bool:
    return bool(req.kv.holds_kv)
