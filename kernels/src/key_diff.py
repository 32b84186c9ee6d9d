"""How little a key is like the others of its block, read where the keys lie (selection/key_diff.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from sglang_apb.kernels.candidates import Candidates

TILE = 128
# Below, a vector has no direction; as in torch's normalize.
EPSILON = 1e-12


def key_diff_reference(keys: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """-cos(key, mean of the block's unit keys): float32 [num_blocks, num_kv_heads, max_length].

    keys: [num_rows, num_kv_heads, head_dim], any strides with a contiguous last dimension.
    Blocks shorter than candidates.max_length are padded with -inf.
    """
    shape = (len(candidates.spans), keys.shape[1], candidates.max_length)
    padded = keys.new_full(shape, -torch.inf, dtype=torch.float32)
    for target, span in zip(padded, candidates.spans, strict=True):
        if len(span):
            units = F.normalize(keys[span.start : span.end].float(), dim=-1)
            mean = F.normalize(units.mean(dim=0), dim=-1)
            target[:, : len(span)] = -torch.einsum("nhd,hd->hn", units, mean)
    return padded


def key_diff_triton(keys: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """One launch; a program a block and KV head, which reads the block's keys from memory once and, for the scores,
    once more from the cache.
    """
    if keys.stride(-1) != 1:
        raise ValueError(f"keys need a contiguous last dimension: strides {keys.stride()}")
    num_blocks, (num_kv_heads, head_dim) = len(candidates.spans), keys.shape[1:]
    padded = keys.new_empty((num_blocks, num_kv_heads, candidates.max_length), dtype=torch.float32)
    _key_diff_kernel[(num_kv_heads, num_blocks)](
        keys,
        candidates.table,
        padded,
        candidates.max_length,
        keys.stride(0),
        keys.stride(1),
        EPSILON,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=TILE,
        num_warps=8,
    )
    return padded


@triton.jit
def _load_units(
    keys, first, length, stride_row, epsilon, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr
):
    """TILE unit keys, float32 [TILE, PADDED_DIM], 0 past the end."""
    token = first + tl.arange(0, TILE)
    dim = tl.arange(0, PADDED_DIM)
    key = tl.load(
        keys + token.to(tl.int64)[:, None] * stride_row + dim[None, :],
        mask=(token < length)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    norm = tl.sqrt(tl.sum(key * key, axis=1))
    return key / tl.maximum(norm, epsilon)[:, None]


@triton.jit(do_not_specialize=["max_length"])  # prompts differ in it: nothing is to be compiled for each
def _key_diff_kernel(
    keys,
    table,
    padded,
    max_length,
    stride_row,
    stride_head,
    epsilon,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One block and KV head: the direction of its mean unit key, then each key's cosine to it."""
    head = tl.program_id(0)  # programs that run together read the same rows, which lie together in memory
    block = tl.program_id(1)
    start = tl.load(table + block * 4).to(tl.int64)
    length = tl.load(table + block * 4 + 1)
    keys += start * stride_row + head * stride_head

    total = tl.zeros([PADDED_DIM], tl.float32)
    for first in range(0, length, TILE):
        total += tl.sum(_load_units(keys, first, length, stride_row, epsilon, HEAD_DIM, PADDED_DIM, TILE), axis=0)
    mean = total / tl.maximum(tl.sqrt(tl.sum(total * total, axis=0)), epsilon)

    line = padded + (block * tl.num_programs(0) + head).to(tl.int64) * max_length
    for first in range(0, max_length, TILE):
        units = _load_units(keys, first, length, stride_row, epsilon, HEAD_DIM, PADDED_DIM, TILE)
        token = first + tl.arange(0, TILE)
        score = tl.where(token < length, -tl.sum(units * mean[None, :], axis=1), -float("inf"))
        tl.store(line + token, score, mask=token < max_length)
