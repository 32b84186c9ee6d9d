"""What a decoder layer does with each row alone beside matrix products: in plain PyTorch, or with SGLang's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

EPSILON = 1e-5
_ROPE_BASE = 500000.0
ROW_KERNELS = ("torch", "sglang")


class TorchRowOps:
    """Several PyTorch kernels an operation."""

    def rotation(self, positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> Any:
        """What `rotate` needs of the rows' positions: [cosines, sines], each [num_rows, 1, head_dim / 2]."""
        return [x.to(dtype)[:, None] for x in angles(positions, head_dim)]

    def rotate(self, q: torch.Tensor, k: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE of q and k, [num_rows, num_heads, head_dim] each; may write over them."""
        return _rotated(q, *rotation), _rotated(k, *rotation)

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(RMS norm of the sum, the sum), [num_rows, hidden] each; may write over x and residual."""
        residual = residual + x
        return F.rms_norm(residual, weight.shape, weight, EPSILON), residual

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half of the columns) * second half."""
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up


class SglangRowOps(TorchRowOps):
    """The kernels that SGLang itself runs on CUDA: one an operation, in place."""

    def rotation(self, positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> Any:
        """SGLang's table by position, here by row, float32 [num_rows, head_dim]; and each row's place in it."""
        return torch.cat(angles(positions, head_dim), dim=-1), torch.arange(len(positions), device=positions.device)

    def rotate(self, q: torch.Tensor, k: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace

        table, places = rotation
        apply_rope_with_cos_sin_cache_inplace(q=q, k=k, cos_sin_cache=table, positions=places, is_neox=True)
        return q, k

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from sgl_kernel import fused_add_rmsnorm

        fused_add_rmsnorm(x, residual, weight, EPSILON)
        return x, residual

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        from sgl_kernel import silu_and_mul

        return silu_and_mul(gate_up)


def row_ops(name: str) -> TorchRowOps:
    """By a name of ROW_KERNELS."""
    return SglangRowOps() if name == "sglang" else TorchRowOps()


def angles(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [num_rows, head_dim / 2]."""
    steps = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    turns = positions[:, None].float() * _ROPE_BASE**-steps
    return turns.cos(), turns.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
