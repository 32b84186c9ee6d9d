"""Where the rounds of a long prompt end: pure arithmetic, the same on every rank.

    [0 .. anchor .. end of round 1) [.. round 2) ... [.. last round, question]

A round ends on a unit, one block of each rank, so that all ranks have as much to do in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_apb.layout import Layout


@dataclass(frozen=True)
class Rounds:
    """Of one prompt, in tokens. `unit`: one block of each rank. `size`: of a round, whole units.

    The first round has the whole anchor.
    """

    unit: int
    size: int
    anchor: int
    context_end: int

    @property
    def longest(self) -> int:
        """A round at most: behind a found context, or with the anchor."""
        return max(self.size + self.unit, self._next_unit(self.anchor))

    def end_of(self, start: int) -> int | None:
        """Where the round ends that begins at token `start`; None when it is the prompt's last.

        A beginning that was found in the cache may end anywhere: the rest of its unit comes on top.
        """
        end = max(self._next_unit(start) + self.size, self._next_unit(self.anchor))
        return None if end >= self.context_end else end

    def _next_unit(self, token: int) -> int:
        return -(-token // self.unit) * self.unit


def rounds_of(layout: Layout, round_tokens: int) -> Rounds:
    """Of `round_tokens` a rank, in whole blocks, and at least one."""
    block = len(layout.blocks[0])
    unit = layout.num_ranks * block
    return Rounds(unit, max(round_tokens // block, 1) * unit, layout.anchor, layout.context_end)
