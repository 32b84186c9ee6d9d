"""Feed-forward layers of a long prompt: a part of its rows at a time, with the same result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_apb.patches import row_chunks


@pytest.mark.parametrize("num_rows", [1, 5, 8, 10, 13])
def test_chunks_give_what_all_rows_at_once_give(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_ROWS", 5)
    weight = torch.randn(8, 8, dtype=torch.float64)
    seen: list[int] = []

    def feed_forward(layer: Any, x: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        seen.append(len(x))
        return torch.relu(x @ weight)

    x = torch.randn(num_rows, 8, dtype=torch.float64)
    wanted = torch.relu(x @ weight)
    (hook,) = {patch.hook for patch in row_chunks.PATCHES}
    assert torch.allclose(hook(feed_forward, SimpleNamespace(), x, None), wanted)
    assert max(seen) <= 7 and max(seen) - min(seen) <= 1 and sum(seen) == num_rows
