"""What a prompt's rounds leave for later ones, on each rank: all that later blocks see of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Shared:
    """Of one layer, [anchor | passing tokens], as the next block sees it (sparse_attention.py).

    keys_values: [num_keys, 2, num_kv_heads, head_dim]. scores: of its passing tokens, float32
    [num_passing, num_kv_heads]; None where no bound will ask for them.
    """

    keys_values: torch.Tensor
    scores: torch.Tensor | None


@dataclass
class HandedOn:
    """Of one request. `num_tokens`: the context's first ones, which all layers have been through."""

    num_tokens: int = 0
    layers: dict[int, Shared] = field(default_factory=dict)

    def ends_at(self, token: int) -> bool:
        """Whether the round that begins at `token` goes on from here."""
        return 0 < self.num_tokens == token

    def clear(self) -> None:
        self.num_tokens = 0
        self.layers.clear()
