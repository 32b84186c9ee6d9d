"""Selection by keys alone: those least like their block's."""

from __future__ import annotations

import torch

from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.selection.base import Selector


class KeyDiffSelector(Selector):
    """score = -cos(key, mean of the unit keys of the block's candidates), after RoPE.

    What a block says again and again is near its mean key; what it says once is far from it. Of the question nothing
    is asked, so a block's choice is the same whatever follows it.
    """

    def score(
        self, keys: torch.Tensor, question: torch.Tensor, candidates: Candidates, kernels: Kernels
    ) -> torch.Tensor:
        return kernels.key_diff(keys, candidates)
