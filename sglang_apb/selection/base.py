"""Scoring apart from selecting: a selector is one file with one `score`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates


class Selector(ABC):
    """Ranks the tokens of blocks by how much later tokens will want them; a block hands on those that score best.

    Equal scores are common (pooling gives neighbours the same one): the earlier token wins, so that the choice does
    not depend on the device.
    """

    @abstractmethod
    def score(
        self, keys: torch.Tensor, question: torch.Tensor, candidates: Candidates, kernels: Kernels
    ) -> torch.Tensor:
        """Scores, float32 [num_blocks, num_kv_heads, candidates.max_length]; -inf after a block's last candidate.

        keys: [num_rows, num_kv_heads, head_dim], after RoPE, of which `candidates` are consecutive tokens of blocks.
        question: [num_question_tokens, num_q_heads, head_dim], after RoPE.
        """
