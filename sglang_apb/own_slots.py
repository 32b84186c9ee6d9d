"""Slots of a prompt of which each rank keeps its own blocks: R ranks hold prompts of R times the length.

    tokens   | unit 0: a block of each rank | unit 1 | ... | question       |
    slots    | as many as its longest block |  ...   |     | a slot a token |

The tokens of a unit share its slots: on each rank these hold the rank's own block. All ranks take the same slots,
whatever they own, so that their schedulers see the same free space. A prompt's row of SGLang's table has for each token
the slot that it has on the rank that owns it.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_apb.layout import Layout, Span


@dataclass(frozen=True)
class OwnSlots:
    """Of one prompt. `units` are blocks that follow each other, one of each rank, fewer in the last."""

    units: tuple[tuple[Span, ...], ...]
    question: Span
    num_ranks: int

    @classmethod
    def of(cls, layout: Layout) -> OwnSlots:
        num_ranks = layout.num_ranks
        starts = range(0, layout.num_blocks, num_ranks)
        return cls(tuple(layout.blocks[start : start + num_ranks] for start in starts), layout.question, num_ranks)

    @property
    def block(self) -> int:
        """Slots of a whole unit, where all have as many."""
        return len(self.units[0][0])

    @property
    def unit(self) -> int:
        """Tokens of a whole unit."""
        return self.block * self.num_ranks

    @property
    def num_tokens(self) -> int:
        return self.question.end

    @cached_property
    def _first_slots(self) -> tuple[int, ...]:
        """Of each unit, and of the question."""
        return (0, *itertools.accumulate(max(map(len, unit)) for unit in self.units))

    @property
    def num_slots(self) -> int:
        return self._first_slots[-1] + len(self.question)

    def num_before(self, token: int) -> int:
        """Slots that the tokens before `token` take, which begins a unit or is one of the question."""
        if token >= self.question.start:
            return self._first_slots[-1] + token - self.question.start
        return self._first_slots[bisect.bisect_left(self.units, token, key=lambda unit: unit[0].start)]

    def num_of(self, tokens: Span) -> int:
        """Slots that these tokens take, which begin and end where units or the prompt do."""
        return self.num_before(tokens.end) - self.num_before(tokens.start)

    def slots_of(self, tokens: Span) -> torch.Tensor:
        """Number of each token's slot among the prompt's, int64 [num_tokens]."""
        found = []
        for spans, first in zip((*self.units, (self.question,)), self._first_slots, strict=True):
            for span in spans:
                if len(part := span.within(tokens)):
                    found.append(torch.arange(part.start, part.end) - span.start + first)
        return torch.cat(found)

    def holders_of(self, tokens: Span) -> torch.Tensor:
        """Of the slots that context tokens take, a token of each, in the slots' order: int64 [num_slots].

        The tokens begin and end where units do.
        """
        longest = (max(unit, key=len) for unit in self.units)
        parts = [block for block in longest if tokens.start <= block.start and block.end <= tokens.end]
        return torch.cat([torch.arange(part.start, part.end) for part in parts] or [torch.arange(0)])
