"""An engine, a selector and ranks that show each of their calls to an observer, and ranks that are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_apb.attention.base import Attention, AttentionEngine, Partial, Piece
from sglang_apb.commands.bench.timing import Observe
from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import Layout, num_rows
from sglang_apb.rank_group import Pending, RankGroup
from sglang_apb.selection.base import Selector

SCORES, SELECT, PACK, MERGE = "scores", "select", "pack", "merge"
OWN, QUESTION, BEFORE = "own blocks", "question", "before"
QUESTION_ITSELF = "question itself"
COMMUNICATION = "communication"
# What SparseAttention plans, in its order; all further calls are BEFORE, a group of blocks each.
_CALLS = (OWN, QUESTION, QUESTION_ITSELF)


@dataclass(frozen=True)
class AttentionCall:
    """One planned call, with the pieces that it was planned for."""

    pieces: tuple[Piece, ...]
    attend: Attention

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        return self.attend(q, k, v, scale, out)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head."""
        return sum(
            piece.num_queries * (piece.num_queries + 1) // 2 if piece.causal else piece.num_queries * len(piece.keys)
            for piece in self.pieces
        )


class ObservedEngine(AttentionEngine):
    """Shows SparseAttention's calls as OWN, QUESTION, QUESTION_ITSELF, BEFORE, and kernels as SELECT, PACK, MERGE."""

    def __init__(self, engine: AttentionEngine, observe: Observe) -> None:
        self._engine = engine
        self._observe = observe
        kernels = engine.kernels
        self.kernels = replace(
            kernels,
            select=self._shown(SELECT, kernels.select),
            pack=self._shown(PACK, kernels.pack),
            merge=self._shown(MERGE, kernels.merge),
        )

    def plan(self, calls: Sequence[Sequence[Piece]]) -> list[Attention]:
        names = [*_CALLS, *[BEFORE] * (len(calls) - len(_CALLS))]
        return [
            self._shown(name, AttentionCall(tuple(pieces), attend))
            for name, pieces, attend in zip(names, calls, self._engine.plan(calls), strict=True)
        ]

    def _shown(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self._observe(part, function, *args)


class ObservedSelector(Selector):
    """Shows the whole of `score`; `kernels` are unobserved ones, so that nothing is shown twice."""

    def __init__(self, selector: Selector, kernels: Kernels, observe: Observe) -> None:
        self._selector = selector
        self._kernels = kernels
        self._observe = observe

    def score(
        self, keys: torch.Tensor, question: torch.Tensor, candidates: Candidates, kernels: Kernels
    ) -> torch.Tensor:
        return self._observe(SCORES, self._selector.score, keys, question, candidates, self._kernels)


class ObservedGroup(RankGroup):
    """Shows the start of each collective and the wait for it: on CUDA, how long the layer stands still.

    `received`: bytes that each collective, since this list was last cleared, brings to this rank from others.
    """

    def __init__(self, group: RankGroup, observe: Observe) -> None:
        super().__init__()
        self.size, self.rank = group.size, group.rank
        self.received: list[int] = []
        self._ranks = group
        self._observe = observe

    def gather_together(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> Pending:
        row_bytes = sum(rows.shape[1:].numel() * rows.itemsize for rows in parts)
        self.received.append((self.size - 1) * max(counts) * row_bytes)
        return self._shown(self._observe(COMMUNICATION, self._ranks.gather_together, parts, counts))

    def gather_padded(self, rows: torch.Tensor, counts: Sequence[int]) -> Pending:
        return self._shown(super().gather_padded(rows, counts))

    def broadcast(self, rows: torch.Tensor, source: int) -> Pending:
        self.received.append(rows.nbytes)
        return self._shown(self._observe(COMMUNICATION, self._ranks.broadcast, rows, source))

    def _shown(self, pending: Pending) -> Pending:
        return _ObservedPending(pending, self._observe) if pending.works else pending


class _ObservedPending(Pending):
    def __init__(self, pending: Pending, observe: Observe) -> None:
        super().__init__(pending.result, pending.works)
        self._observe = observe

    def wait(self) -> Any:
        return self._observe(COMMUNICATION, super().wait)


class StandInGroup(RankGroup):
    """Rank `rank` of `size` without the others: their rows are random numbers that lie there already."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._others: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def gather_together(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> Pending:
        gathered = [self._from_others(rows, (self.size, max(counts), *rows.shape[1:])) for rows in parts]
        for all_rows, rows in zip(gathered, parts, strict=True):
            all_rows[self.rank, : len(rows)] = rows
        return Pending(gathered)

    def broadcast(self, rows: torch.Tensor, source: int) -> Pending:
        if source != self.rank:
            rows.copy_(self._from_others(rows, rows.shape))
        return Pending(rows)

    def _from_others(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        key = (torch.Size(shape), like.dtype)
        if key not in self._others:
            self._others[key] = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self._others[key]


def rank_pairs(layout: Layout, rank: int) -> int:
    """(query, key) pairs of one layer and head on one rank; those of all ranks are layout.attention_pairs."""
    rows = layout.rows_of(rank)
    pairs = _triangle(num_rows(layout.anchor_copy))
    for block, span in rows.block_tokens.items():
        pairs += len(span) * layout.num_shared_keys(block) + _triangle(len(span))
    pairs += len(layout.question) * num_rows(rows.block_tokens.values())
    return pairs + (_triangle(len(layout.question)) if rank == 0 else 0)


def _triangle(number: int) -> int:
    return number * (number + 1) // 2
