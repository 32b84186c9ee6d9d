"""Target: `post_attention_layernorm` of a model's last decoder layer, as a module; by PyTorch's forward hooks.

Reason: only a prompt's last row is read after the last layer. Of a sparse prompt its attention gives the question's
rows alone (backends/sparse_attention.py), and what was kept of the layer's input, the residual, has to lose the same
rows before it is added. All that follows (norm, feed-forward layer, output norm) then works on a few rows: with 32
layers, 2.7% of a prompt's matrix products are saved. Official point tried: SGLang prunes after the model.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_apb.patches._patch import SGLANG_VERSION, PatchError


def drop_rows(model: Any) -> None:
    """Installs the hook in `model`, a `...ForCausalLM` of SGLang's. Raises PatchError when it has no such norm."""
    norm = getattr(model.model.layers[-1], "post_attention_layernorm", None)
    if not isinstance(norm, torch.nn.Module):
        found = f"the last layer of {type(model).__name__} has no post_attention_layernorm"
        raise PatchError(f"sglang-apb knows SGLang {SGLANG_VERSION}, and {found}: install sglang=={SGLANG_VERSION}.")
    norm.register_forward_pre_hook(_keep_last_rows)


def _keep_last_rows(norm: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """args: hidden states [num_rows, hidden_size], residual [at least as many rows, hidden_size], and more."""
    if len(args) < 2 or args[1] is None or len(args[0]) == len(args[1]):
        return None
    hidden, residual, *more = args
    return (hidden, residual[-len(hidden) :], *more)
