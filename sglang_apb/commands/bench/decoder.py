"""One decoder layer of a model's sizes with random weights, in plain PyTorch, whole or a tensor-parallel share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.commands.bench.models import DecoderShape
from sglang_apb.commands.bench.observed import COMMUNICATION
from sglang_apb.commands.bench.row_ops import row_ops
from sglang_apb.commands.bench.setup import InProcess
from sglang_apb.commands.bench.timing import Observe
from sglang_apb.patches import row_chunks

PROJECTIONS, NORMS, KV_CACHE, FFN = "projections", "RoPE and norms", "KV cache", "FFN"
_SPREAD = 0.02

Attend = Callable[[LayerRows], torch.Tensor]
Reduce = Callable[[torch.Tensor], Any]


def why_not_shared(shape: DecoderShape, num_ranks: int) -> str | None:
    """Why tensor parallelism over `num_ranks` is not possible; None when it is."""
    for number, what in ((shape.num_heads, "query heads"), (shape.intermediate, "FFN columns")):
        if number % num_ranks:
            return f"{number:,} {what} do not divide over {num_ranks} ranks"
    few, many = sorted((shape.num_kv_heads, num_ranks))
    return f"{shape.num_kv_heads} KV heads do not divide over {num_ranks} ranks" if many % few else None


class DecoderLayer:
    """Norm, attention, norm, gated FFN. `num_shares`: tensor-parallel ranks, of which this has one's heads and columns.

    `reduce` sums hidden states over these ranks in place. Norms of single heads (Qwen3) are left out.
    """

    def __init__(self, setting: InProcess, num_rows: int, num_shares: int, reduce: Reduce) -> None:
        shape, device, dtype = setting.shape, setting.device, setting.dtype
        self._ops = row_ops(setting.row_kernels)
        self._head_dim = shape.head_dim
        self._heads = (shape.num_heads // num_shares, *[max(shape.num_kv_heads // num_shares, 1)] * 2)
        self._reduce = reduce
        columns = shape.intermediate // num_shares

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * _SPREAD

        self._qkv = weight(sum(self._heads) * shape.head_dim, shape.hidden)
        self._o = weight(shape.hidden, self._heads[0] * shape.head_dim)
        self._gate_up = weight(2 * columns, shape.hidden)
        self._down = weight(shape.hidden, columns)
        self._norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self._cache = torch.empty(2, num_rows, self._heads[1], shape.head_dim, device=device, dtype=dtype)
        self._slots = torch.arange(num_rows, device=device)

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor, rotation: Any, attend: Attend, observe: Observe
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden, residual [num_rows, hidden] -> the next layer's; may write over them. rotation: the row ops'."""
        x, residual = observe(NORMS, self._ops.add_and_norm, hidden, residual, self._norm)
        qkv = observe(PROJECTIONS, F.linear, x, self._qkv).unflatten(1, (-1, self._head_dim))
        q, k, v = qkv.split(self._heads, dim=1)
        q, k = observe(NORMS, self._ops.rotate, q, k, rotation)
        observe(KV_CACHE, self._keep, k, v)
        out = attend(LayerRows(q, k, v, self._head_dim**-0.5))
        x = observe(PROJECTIONS, F.linear, out.flatten(1), self._o)
        observe(COMMUNICATION, self._reduce, x)
        x, residual = observe(NORMS, self._ops.add_and_norm, x, residual, self._norm)
        x = observe(FFN, self._feed_forward, x)
        observe(COMMUNICATION, self._reduce, x)
        return x, residual

    def _keep(self, k: torch.Tensor, v: torch.Tensor) -> None:
        for cache, rows in zip(self._cache, (k, v), strict=True):
            cache[self._slots] = rows

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """In chunks of rows, as patches/row_chunks.py does it; x is written over."""
        for rows in row_chunks.split(x):
            rows.copy_(F.linear(self._ops.gate(F.linear(rows, self._gate_up)), self._down))
        return x
