"""The ranks' collectives: what they gather, and that many of them may be under way."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_ranks

from sglang_apb.rank_group import RankGroup

_COUNTS = [3, 5]


def test_many_gathers_under_way_give_what_each_rank_sent() -> None:
    """Two threads of gloo once wrote one string of PyTorch's at a time, and a server died now and then."""
    run_ranks(2, _gather_many)


def _gather_many(group: Any) -> None:
    ranks = RankGroup(group)
    wanted = [_parts(rank) for rank in range(ranks.size)]
    for _ in range(500):
        pending = [ranks.gather_together(wanted[ranks.rank], _COUNTS) for _ in range(10)]
        gathered = [each.wait() for each in pending]
    for each in gathered:
        for part, of_all in enumerate(each):
            for rank, rows in enumerate(of_all):
                assert torch.equal(rows[: _COUNTS[rank]], wanted[rank][part])
                assert not rows[_COUNTS[rank] :].any()


def _parts(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(1.0, 1 + 8 * _COUNTS[rank]).reshape(-1, 2, 4) + 100 * rank
    return rows, -rows
