"""The best candidates of every block and KV head, ties to the earlier token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sglang_apb.kernels.candidates import Candidates

# Candidates that are looked at together: the fewest that a block fits in, or its parts of the most.
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192)


def select_reference(scores: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """Rows of the keys to hand on: int32 [candidates.num_selected, num_kv_heads], block after block.

    scores: a selector's, float32 [num_blocks, num_kv_heads, max_length], contiguous.
    A block's rows ascend, so that packing reads memory forward. Nothing waits for the device.
    """
    chosen = [torch.empty(0, scores.shape[1], dtype=torch.int32, device=scores.device)]
    for score, span, count in zip(scores, candidates.spans, candidates.num_passing, strict=True):
        order = score[:, : len(span)].sort(dim=-1, descending=True, stable=True).indices
        chosen.append((span.start + order[:, :count].sort(dim=-1).values.T).int())
    return torch.cat(chosen)


def select_triton(scores: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """One launch. torch.sort(stable=True) chooses the same, and is a radix sort of all scores, values and int64
    indices, in some twenty launches, plus those that cut and shift its result; torch.topk does not say which of
    several equals it takes. Nothing here needs the order among the chosen.
    """
    num_blocks, num_kv_heads, max_length = scores.shape
    rows = torch.empty(candidates.num_selected, num_kv_heads, dtype=torch.int32, device=scores.device)
    chunk = next((chunk for chunk in CHUNKS if chunk >= max_length), CHUNKS[-1])
    _select_kernel[(num_blocks, num_kv_heads)](
        scores,
        candidates.table,
        rows,
        max_length,
        NUM_KV_HEADS=num_kv_heads,
        CHUNK=chunk,
        num_warps=max(4, chunk // 512),
    )
    return rows


@triton.jit
def _load_ordered(scores, token, length):
    """Scores as uint32 that compare as the scores do; 0 past the end, which no number maps to."""
    score = tl.load(scores + token, mask=token < length, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)  # -0.0 equals 0.0
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(token < length, ordered, 0)


@triton.jit
def _num_above(scores, length, value, CHUNK: tl.constexpr):
    """How many scores are larger than `value`, in the order of _load_ordered."""
    count = (_load_ordered(scores, tl.arange(0, CHUNK), length) > value).to(tl.int32)
    for first in range(CHUNK, length, CHUNK):
        count += (_load_ordered(scores, first + tl.arange(0, CHUNK), length) > value).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["max_length"])  # prompts differ in it: nothing is to be compiled for each
def _select_kernel(scores, table, rows, max_length, NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """One block and KV head: finds the num_passing-th largest score bit by bit, then writes what is above it."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(table + block * 4)
    length = tl.load(table + block * 4 + 1)
    num_passing = tl.load(table + block * 4 + 2)
    slot = tl.load(table + block * 4 + 3)
    scores += (block * NUM_KV_HEADS + head).to(tl.int64) * max_length

    # The largest value that num_passing scores reach. The first chunk, mostly the only one, stays in registers.
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        threshold = tl.where(_num_above(scores, length, higher - 1, CHUNK) >= num_passing, higher, threshold)
        bit = bit >> 1

    num_ties = num_passing - _num_above(scores, length, threshold, CHUNK)
    for first in range(0, length, CHUNK):
        token = first + tl.arange(0, CHUNK)
        ordered = _load_ordered(scores, token, length)
        is_tie = ordered == threshold
        tie = tl.cumsum(is_tie.to(tl.int32), axis=0)  # from 1 on, earlier tokens first
        chosen = (token < length) & ((ordered > threshold) | (is_tie & (tie <= num_ties)))
        place = tl.cumsum(chosen.to(tl.int32), axis=0)
        tl.store(rows + (slot + place - 1) * NUM_KV_HEADS + head, start + token, mask=chosen)
        num_ties -= tl.sum(is_tie.to(tl.int32), axis=0)
        slot += tl.sum(chosen.to(tl.int32), axis=0)
