"""Attention over several sets of keys, merged by their LSEs, of base 2: out = sum 2^(lse_i - lse) out_i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TILE = 32
# More are merged step by step: the kernel is unrolled over them, and with 64 its compilation takes a minute.
MAX_AT_ONCE = 8


def merge_reference(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Writes attention over the union of the partials' keys into `out`, and its LSE into `lse` if given.

    outs: each [num_rows, num_heads, head_dim], any float dtype, any strides with a contiguous last dimension.
    lses: each [num_rows, num_heads], float32, of base 2, any strides. -inf marks a row without keys, whose
        `outs` is not read.
    out, lse: as one of outs and lses. `out` may be one of `outs`. A row without any key becomes 0 and -inf.
    """
    stacked = torch.stack(list(lses))
    # Taken out of all exponents, so that none overflows; -inf minus -inf would be no number.
    largest = stacked.amax(dim=0).nan_to_num(neginf=0.0)
    weights = torch.exp2(stacked - largest)
    total = weights.sum(dim=0)
    merged = torch.zeros_like(out, dtype=torch.float32)
    for part, weight in zip(outs, (weights / total.clamp_min(1.0))[..., None], strict=True):
        merged += torch.where(weight > 0, weight * part, 0)
    out.copy_(merged)
    if lse is not None:
        lse.copy_(largest + total.log2())


def merge_triton(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    if any(part.stride(-1) != 1 for part in (*outs, out)):
        raise ValueError(f"need contiguous last dimensions: strides {[part.stride() for part in (*outs, out)]}")
    while len(outs) > MAX_AT_ONCE:
        begun, begun_lse = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lses[0])
        merge_triton(outs[:MAX_AT_ONCE], lses[:MAX_AT_ONCE], begun, begun_lse)
        outs, lses = [begun, *outs[MAX_AT_ONCE:]], [begun_lse, *lses[MAX_AT_ONCE:]]
    num_rows, num_heads, head_dim = out.shape
    _merge_kernel[(triton.cdiv(num_rows * num_heads, TILE),)](
        tuple(outs),
        tuple(part.stride(0) for part in outs),
        tuple(part.stride(1) for part in outs),
        tuple(lses),
        tuple(part.stride(0) for part in lses),
        tuple(part.stride(1) for part in lses),
        out,
        out.stride(0),
        out.stride(1),
        lse,
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        num_rows * num_heads,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        TILE=TILE,
    )


# Prompts differ in these: nothing is to be compiled for each. With an odd number of heads, a row's LSEs lie anywhere.
@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["lses", "merged_lse"])
def _merge_kernel(
    outs,
    out_strides_row,
    out_strides_head,
    lses,
    lse_strides_row,
    lse_strides_head,
    merged,
    merged_stride_row,
    merged_stride_head,
    merged_lse,
    merged_lse_stride_row,
    merged_lse_stride_head,
    num_pairs,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE pairs of (row, head)."""
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = pair < num_pairs
    row = (pair // NUM_HEADS).to(tl.int64)
    head = pair % NUM_HEADS
    dim = tl.arange(0, PADDED_DIM)[None, :]

    largest = tl.full([TILE], -float("inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        offset = row * lse_strides_row[i] + head * lse_strides_head[i]
        largest = tl.maximum(largest, tl.load(lses[i] + offset, mask=inside, other=-float("inf")))
    # Taken out of all exponents, so that none overflows; -inf minus -inf would be no number.
    largest = tl.where(largest == -float("inf"), 0.0, largest)

    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, PADDED_DIM], tl.float32)
    for i in tl.static_range(len(outs)):
        offset = row * lse_strides_row[i] + head * lse_strides_head[i]
        lse = tl.load(lses[i] + offset, mask=inside, other=-float("inf"))
        weight = tl.exp2(lse - largest)
        total += weight
        part = tl.load(
            outs[i] + (row * out_strides_row[i] + head * out_strides_head[i])[:, None] + dim,
            mask=(weight > 0.0)[:, None] & (dim < HEAD_DIM),
            other=0.0,
        )
        acc += weight[:, None] * part.to(tl.float32)

    acc = acc * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    target = merged + (row * merged_stride_row + head * merged_stride_head)[:, None] + dim
    tl.store(target, acc.to(merged.dtype.element_ty), mask=inside[:, None] & (dim < HEAD_DIM))
    if merged_lse is not None:
        lse = tl.where(total > 0.0, largest + tl.log2(total), -float("inf"))
        tl.store(merged_lse + row * merged_lse_stride_row + head * merged_lse_stride_head, lse, mask=inside)
