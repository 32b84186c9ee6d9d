"""Query-aware selection without training (Spava, zigzag_lring_flash_attn.py:60-91)."""

from __future__ import annotations

import torch

from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.kernels.query import mean_question
from sglang_apb.selection.base import Selector


class QuerySelector(Selector):
    """score = max-pool over 5 neighbours of mean over question tokens and grouped heads of q . k.

    The mean is linear, so the question is averaged once and each key costs one dot product a KV head.
    Pooling stays within the block: its neighbours in memory may be far away in the text.
    """

    def score(
        self, keys: torch.Tensor, question: torch.Tensor, candidates: Candidates, kernels: Kernels
    ) -> torch.Tensor:
        return kernels.query(keys, mean_question(question, keys.shape[1]), candidates)
