"""Query-aware selection without training (Spava, zigzag_lring_flash_attn.py:60-91)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang_apb.selection.base import Selector

POOL_WIDTH = 5


class QuerySelector(Selector):
    """score = max-pool over 5 neighbours of mean over question tokens and grouped heads of q . k.

    The mean is linear, so the question is averaged once and each key costs one dot product a KV head.
    Pooling stays within the block: its neighbours in memory may be far away in the text.
    """

    def score(self, keys: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        num_kv_heads, head_dim = keys.shape[1:]
        mean = question.float().mean(dim=0).view(num_kv_heads, -1, head_dim).mean(dim=1)  # [num_kv_heads, head_dim]
        raw = torch.einsum("nhd,hd->hn", keys.float(), mean)
        return F.max_pool1d(raw, POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2).T
