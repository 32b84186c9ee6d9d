"""Attention with the kernels that come with PyTorch: for CPUs, and for GPUs without FlashInfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_apb.attention.base import AttentionEngine, Partial, Segment

_HALF = (torch.float16, torch.bfloat16)


class SdpaEngine(AttentionEngine):
    """One kernel call a segment.

    `scaled_dot_product_attention` does not return the log-sum-exp, so its kernels are called by name: the flash
    kernels of CPU and CUDA, and the memory-efficient one for float32 on CUDA, which flash does not take.
    """

    def attend(self, segments: Sequence[Segment], scale: float) -> list[Partial]:
        return [_attend(segment, scale) for segment in segments]


def _attend(segment: Segment, scale: float) -> Partial:
    num_queries, num_heads, _ = segment.q.shape
    if num_queries == 0 or segment.k.shape[0] == 0:
        lse = segment.q.new_full((num_queries, num_heads), -torch.inf, dtype=torch.float32)
        return Partial(torch.zeros_like(segment.q), lse)
    # [num_tokens, num_heads, head_dim] -> [1, num_heads, num_tokens, head_dim]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (segment.q, segment.k, segment.v))
    out, lse = _kernel(q, k, v, segment.causal, scale)
    return Partial(out[0].transpose(0, 1), lse[0, :, :num_queries].transpose(0, 1))


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
