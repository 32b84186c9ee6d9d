"""Scoring apart from selecting: a selector is one file with one `score`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Selector(ABC):
    """Ranks the tokens of one block by how much later tokens will want them."""

    @abstractmethod
    def score(self, keys: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Scores, float32 [num_keys, num_kv_heads].

        keys: [num_keys, num_kv_heads, head_dim], after RoPE, consecutive tokens of one block.
        question: [num_question_tokens, num_q_heads, head_dim], after RoPE.
        """

    def select(self, keys: torch.Tensor, question: torch.Tensor, num_selected: int) -> torch.Tensor:
        """Which tokens to hand on: int64 [num_selected, num_kv_heads], indices into `keys`, best first.

        Equal scores are common (pooling gives neighbours the same one): the earlier token wins, so that the choice
        does not depend on the device. `topk` promises no order among equals.
        """
        return self.score(keys, question).sort(dim=0, descending=True, stable=True).indices[:num_selected]


def take(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """rows [num_rows, num_kv_heads, head_dim] at indices [num_selected, num_kv_heads], head by head."""
    return rows.gather(0, indices[..., None].expand(-1, -1, rows.shape[-1]))
