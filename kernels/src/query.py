"""Query-aware scores, max-pooled within each block, read from the keys where they lie (selection/query.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from sglang_apb.kernels.candidates import Candidates

POOL_WIDTH = 5
TILE = 128


def mean_question(question: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The question averaged over its tokens and over each KV head's query heads: float32 [num_kv_heads, head_dim].

    question: [num_question_tokens, num_q_heads, head_dim], after RoPE, any strides.
    Plain torch everywhere: this is one kernel on a GPU too, and it makes no float32 copy.
    """
    return question.unflatten(1, (num_kv_heads, -1)).mean(dim=(0, 2), dtype=torch.float32)


def query_reference(keys: torch.Tensor, question: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """Max over 5 neighbours in the block of question . key: float32 [num_blocks, num_kv_heads, max_length].

    keys: [num_rows, num_kv_heads, head_dim], any strides with a contiguous last dimension.
    question: `mean_question`, float32 [num_kv_heads, head_dim], contiguous.
    Blocks shorter than candidates.max_length are padded with -inf.
    """
    padded = question.new_full((len(candidates.spans), keys.shape[1], candidates.max_length), -torch.inf)
    for target, span in zip(padded, candidates.spans, strict=True):
        if len(span):
            raw = torch.einsum("nhd,hd->hn", keys[span.start : span.end].float(), question)
            target[:, : len(span)] = F.max_pool1d(raw, POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)
    return padded


def query_triton(keys: torch.Tensor, question: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    if keys.stride(-1) != 1 or not question.is_contiguous():
        raise ValueError(f"keys need a contiguous last dimension, the question all: strides {keys.stride()}")
    num_blocks, (num_kv_heads, head_dim) = len(candidates.spans), keys.shape[1:]
    padded = question.new_empty((num_blocks, num_kv_heads, candidates.max_length))
    num_tiles = triton.cdiv(candidates.max_length, TILE - POOL_WIDTH + 1)
    _query_kernel[(num_tiles * num_kv_heads, num_blocks)](
        keys,
        question,
        candidates.table,
        padded,
        candidates.max_length,
        keys.stride(0),
        keys.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        HALF_WIDTH=POOL_WIDTH // 2,
        TILE=TILE,
        num_warps=8,
    )
    return padded


@triton.jit(do_not_specialize=["max_length"])  # prompts differ in it: nothing is to be compiled for each
def _query_kernel(
    keys,
    question,
    table,
    padded,
    max_length,
    stride_row,
    stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE tokens of one block and KV head, of which HALF_WIDTH on each side are the neighbouring tiles'."""
    # Heads turn fastest: programs that run together read the same rows, which lie together in memory.
    head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    block = tl.program_id(1)
    start = tl.load(table + block * 4)
    length = tl.load(table + block * 4 + 1)

    place = tl.arange(0, TILE)
    token = tile * (TILE - 2 * HALF_WIDTH) - HALF_WIDTH + place
    inside = (token >= 0) & (token < length)
    dim = tl.arange(0, PADDED_DIM)
    row = (start + token).to(tl.int64)
    key = tl.load(
        keys + row[:, None] * stride_row + head * stride_head + dim[None, :],
        mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    asked = tl.load(question + head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    raw = tl.where(inside, tl.sum(key * asked[None, :], axis=1), -float("inf"))

    best = raw
    for offset in tl.static_range(1, HALF_WIDTH + 1):  # clamped at places that are not kept
        best = tl.maximum(best, tl.gather(raw, tl.maximum(place - offset, 0), 0))
        best = tl.maximum(best, tl.gather(raw, tl.minimum(place + offset, TILE - 1), 0))
    best = tl.where(inside, best, -float("inf"))  # neighbours of a block's end are not part of it
    kept = (place >= HALF_WIDTH) & (place < TILE - HALF_WIDTH) & (token < max_length)
    line = (block * NUM_KV_HEADS + head).to(tl.int64) * max_length
    tl.store(padded + line + token, best, mask=kept)
