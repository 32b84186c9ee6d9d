"""What a layer has of the rows that one rank computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerRows:
    """One layer's local rows, after RoPE: q [num_rows, num_q_heads, head_dim], k and v with num_kv_heads.

    Where `SparseAttention.num_cached` says so, k and v have that many cached own tokens in front.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    @classmethod
    def random(
        cls,
        num_rows: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LayerRows:
        """Noise, as views of one projection's rows, as a model has them."""
        heads = (num_q_heads, num_kv_heads, num_kv_heads)
        q, k, v = torch.randn(num_rows, sum(heads), head_dim, device=device, dtype=dtype).split(heads, dim=1)
        return cls(q, k, v, head_dim**-0.5)

    def part(self, start: int, end: int) -> LayerRows:
        """Rows [start, end)."""
        return LayerRows(self.q[start:end], self.k[start:end], self.v[start:end], self.scale)


def nothing() -> None:
    """What is left to do when nothing was started."""
