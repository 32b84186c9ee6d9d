"""Of a model's last layer only some rows go on: the residual follows them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_apb.patches import last_layer
from sglang_apb.patches._patch import PatchError


class Norm(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return hidden if residual is None else hidden + residual


def hooked() -> Norm:
    norm = Norm()
    layers = [SimpleNamespace(post_attention_layernorm=Norm()), SimpleNamespace(post_attention_layernorm=norm)]
    last_layer.drop_rows(SimpleNamespace(model=SimpleNamespace(layers=layers)))
    return norm


def test_the_residual_keeps_the_rows_that_attention_gave() -> None:
    norm, residual = hooked(), torch.arange(12.0).view(6, 2)
    assert torch.equal(norm(torch.ones(2, 2), residual), residual[-2:] + 1)


def test_exact_prompts_and_other_uses_are_left_alone() -> None:
    norm, rows = hooked(), torch.arange(12.0).view(6, 2)
    assert torch.equal(norm(rows, rows), 2 * rows)
    assert torch.equal(norm(rows), rows)


def test_an_unknown_model_is_refused() -> None:
    model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace()]))
    with pytest.raises(PatchError, match="no post_attention_layernorm"):
        last_layer.drop_rows(model)
