"""Chosen rows of K and V, head by head, into the buffer that is sent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 32


def pack_reference(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out[i, 0, h] = keys[rows[i, h], h] and out[i, 1, h] = values[rows[i, h], h].

    keys, values: [num_rows, num_kv_heads, head_dim], any strides with a contiguous last dimension.
    rows: `select.select`, int32 [num_selected, num_kv_heads], contiguous.
    out: [num_selected, 2, num_kv_heads, head_dim], contiguous, in the dtype of keys and values.
    """
    index = rows.long()[..., None].expand(-1, -1, keys.shape[-1])
    out[:, 0] = keys.gather(0, index)
    out[:, 1] = values.gather(0, index)


def pack_triton(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or not out.is_contiguous():
        raise ValueError(f"need contiguous rows: strides {keys.stride()}, {values.stride()}, {out.stride()}")
    num_kv_heads, head_dim = keys.shape[1:]
    _pack_kernel[(triton.cdiv(rows.numel(), TILE),)](
        keys,
        values,
        rows,
        out,
        rows.numel(),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=TILE,
    )


@triton.jit(do_not_specialize=["num_pairs"])  # prompts differ in it: nothing is to be compiled for each
def _pack_kernel(
    keys,
    values,
    rows,
    out,
    num_pairs,
    key_stride_row,
    key_stride_head,
    value_stride_row,
    value_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE pairs of (selected row, KV head), which lie together in `rows` and in `out`."""
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = pair % NUM_KV_HEADS
    row = tl.load(rows + pair, mask=pair < num_pairs, other=0).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    mask = (pair < num_pairs)[:, None] & (dim < HEAD_DIM)
    key = tl.load(keys + (row * key_stride_row + head * key_stride_head)[:, None] + dim, mask=mask)
    value = tl.load(values + (row * value_stride_row + head * value_stride_head)[:, None] + dim, mask=mask)

    selected = (pair // NUM_KV_HEADS).to(tl.int64)
    target = out + ((selected * 2 * NUM_KV_HEADS + head) * HEAD_DIM)[:, None] + dim
    tl.store(target, key, mask=mask)
    tl.store(target + NUM_KV_HEADS * HEAD_DIM, value, mask=mask)
