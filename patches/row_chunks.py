"""Targets: `LlamaMLP.forward` (Mistral's too), `Qwen2MLP.forward` (Qwen3's too).

Reason: a sparse prompt is not chunked. All its rows at once would take 10 times their hidden states' memory in the
feed-forward layers (Llama-3.1-8B: 22 GB for 256K rows), which treat each row alone.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_apb.patches._patch import Patch

# Matrix products of this many rows fill a GPU. SGLang's chunks of exact prompts are no longer, unless asked for.
MAX_ROWS = 16384


def _in_chunks(original: Any, self: Any, x: torch.Tensor, forward_batch: Any = None) -> torch.Tensor:
    """x [num_rows, hidden_size], which the model's layers do not read again: the result takes its place."""
    if x.shape[0] <= MAX_ROWS:
        return original(self, x, forward_batch)
    for rows in x.split(MAX_ROWS):
        rows.copy_(original(self, rows, forward_batch))
    return x


PATCHES = (
    Patch("sglang.srt.models.llama.LlamaMLP.forward", "around", ("self", "x", "forward_batch"), _in_chunks),
    Patch("sglang.srt.models.qwen2.Qwen2MLP.forward", "around", ("self", "x", "forward_batch"), _in_chunks),
)
