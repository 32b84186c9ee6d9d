"""What a GPU server runs before it says that it is ready.

FlashInfer and Triton compile at their first use, for minutes, and ranks meet at their first exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from sglang_apb.attention.base import AttentionEngine, Build
from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import Span, num_rows


def builds(
    engine: AttentionEngine,
    layers: Mapping[str, SparseAttention],
    order: str,
    model: Any,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[Build]:
    """Every module and kernel that a prompt can need, in the model's `dtype`.

    layers: what is then run once each, in `order`, and what of. model: SGLang's ModelConfig.
    """
    heads = (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    found = [
        *engine.builds(*heads, dtype, device),
        *(
            Build(f"selection among {length} tokens", partial(_select, engine.kernels, length, heads[1], device))
            for length in engine.kernels.select_lengths
        ),
    ]
    for name, sparse in layers.items():
        found.append(Build(f"a layer of {name}", partial(_run_layer, sparse, heads, device, dtype, order)))
    return found


def _select(kernels: Kernels, length: int, num_kv_heads: int, device: torch.device | str) -> None:
    candidates = Candidates.of([Span(0, length)], [1], device)
    kernels.select(torch.zeros(1, num_kv_heads, length, device=device), candidates)


def _run_layer(
    sparse: SparseAttention, heads: tuple[int, int, int], device: torch.device | str, dtype: torch.dtype, order: str
) -> None:
    num_cached = sparse.num_cached
    noise = LayerRows.random(num_cached + num_rows(sparse.rows.tokens), *heads, device, dtype)
    if num_cached:
        noise = LayerRows(noise.q[num_cached:], noise.k.contiguous(), noise.v.contiguous(), noise.scale)
    _attend(sparse, noise, order)


def _attend(sparse: SparseAttention, noise: LayerRows, order: str) -> None:
    if order == "one_pass":
        sparse.attend(noise)
        return
    start, context = sparse.rows.question.start, sparse.rows.context
    sparse.attend_context(noise.part(0, start))
    own = noise.part(context.start, context.end)
    sparse.attend_question(noise.part(start, len(noise.q)), own.k, own.v)
