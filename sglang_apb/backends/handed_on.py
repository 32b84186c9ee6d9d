"""What a prompt's rounds leave for later ones, on each rank: all that later blocks see of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Shared:
    """Of one layer, [anchor | passing tokens], as the next block sees it (sparse_attention.py).

    keys_values: [num_keys, 2, num_kv_heads, head_dim]. scores: of its passing tokens, float32
    [num_passing, num_kv_heads]; None where no bound will ask for them. room: a tensor that begins with keys_values.
    """

    keys_values: torch.Tensor
    scores: torch.Tensor | None
    room: torch.Tensor | None = None

    def with_room(self, num_keys: int) -> torch.Tensor:
        """A tensor of `num_keys` that begins with these, in the same memory where there is room."""
        if self.room is not None and len(self.room) >= num_keys:
            return self.room
        longer = self.keys_values.new_empty((num_keys, *self.keys_values.shape[1:]))
        longer[: len(self.keys_values)] = self.keys_values
        return longer


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
