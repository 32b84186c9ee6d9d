"""Attention with the kernels that come with PyTorch: for CPUs, and for GPUs without FlashInfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from sglang_apb.attention.base import Attention, AttentionEngine, Partial, Piece
from sglang_apb.kernels import REFERENCE, Kernels

# PyTorch's kernels give natural logarithms.
LOG2_E = math.log2(math.e)
_HALF = (torch.float16, torch.bfloat16)


class SdpaEngine(AttentionEngine):
    """One kernel call a piece; nothing to plan.

    `scaled_dot_product_attention` does not return the log-sum-exp, so its kernels are called by name: the flash
    kernels of CPU and CUDA, and the memory-efficient one for float32 on CUDA, which flash does not take.
    """

    def __init__(self, kernels: Kernels = REFERENCE) -> None:
        self.kernels = kernels

    def plan(self, calls: Sequence[Sequence[Piece]]) -> list[Attention]:
        return [partial(_attend_all, pieces) for pieces in calls]


def _attend_all(
    pieces: Sequence[Piece],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> Partial:
    parts = []
    start = 0
    for piece in pieces:
        rows, keys = slice(start, start + piece.num_queries), slice(piece.keys.start, piece.keys.end)
        parts.append(_attend(q[rows], k[keys], v[keys], piece.causal, scale))
        start += piece.num_queries
    if len(parts) == 1 and out is None:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], out=out), torch.cat([part.lse for part in parts]))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Partial:
    num_queries, num_heads, _ = q.shape
    if num_queries == 0 or k.shape[0] == 0:
        lse = q.new_full((num_queries, num_heads), -torch.inf, dtype=torch.float32)
        return Partial(torch.zeros_like(q), lse)
    # [num_tokens, num_heads, head_dim] -> [1, num_heads, num_tokens, head_dim]
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out, lse = _kernel(heads_first[0], heads_first[1], heads_first[2], causal, scale)
    return Partial(out[0].transpose(0, 1), lse[0, :, :num_queries].transpose(0, 1) * LOG2_E)


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.dtype in _HALF:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    k, v = _one_kv_head_a_query_head(q, k, v)
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]


def _one_kv_head_a_query_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory-efficient kernel does not know grouped heads."""
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
