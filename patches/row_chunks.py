"""Targets: `LlamaMLP.forward` (Mistral's too), `Qwen2MLP.forward` (Qwen3's too).

Reason: a sparse prompt is not chunked. All its rows at once would take 10 times their hidden states' memory in the
feed-forward layers (Llama-3.1-8B: 22 GB for 256K rows), which treat each row alone. Official point tried: SGLang cuts
prompts into chunks instead, which a sparse prompt cannot be.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_apb.patches._patch import Patch

# Matrix products of about this many rows fill a GPU. SGLang's chunks of exact prompts are no longer, unless asked for.
CHUNK_ROWS = 16384


def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [num_rows, ...] in parts of about CHUNK_ROWS, as equal as can be: a few rows cost as much as hundreds."""
    return x.tensor_split(max(round(x.shape[0] / CHUNK_ROWS), 1))


def _in_chunks(original: Any, self: Any, x: torch.Tensor, forward_batch: Any = None) -> torch.Tensor:
    """x [num_rows, hidden_size], which the model's layers do not read again: the result takes its place."""
    chunks = split(x)
    if len(chunks) == 1:
        return original(self, x, forward_batch)
    for rows in chunks:
        rows.copy_(original(self, rows, forward_batch))
    return x


PATCHES = (
    Patch("sglang.srt.models.llama.LlamaMLP.forward", "around", ("self", "x", "forward_batch"), _in_chunks),
    Patch("sglang.srt.models.qwen2.Qwen2MLP.forward", "around", ("self", "x", "forward_batch"), _in_chunks),
)
