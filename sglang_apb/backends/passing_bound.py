"""The bound on passing tokens: what stays of them for the blocks of each period (`layout.Layout.num_staying`).

A token's score travels with its K and V, so every rank makes the same choice. For most prompts nothing is to be left
out, and all blocks see a prefix of one buffer; from a bounded period on, blocks see a prefix of another:

    first buffer     [anchor | what was handed on before this round | P of this round's blocks]
    bounded period   [anchor | the best of what the buffer before had | P of the period's blocks]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from sglang_apb.backends.handed_on import Shared
from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import BOUND_EVERY, Layout, Span


class PassingBound:
    """Of one round of a prompt; used by all layers in turn.

    chosen: numbers of the blocks whose passing tokens are chosen in it. num_anchor, num_before: how many keys of the
    anchor there are, and with what blocks before those handed on.
    """

    def __init__(
        self,
        layout: Layout,
        chosen: Span,
        num_anchor: int,
        num_before: int,
        kernels: Kernels,
        device: torch.device | str,
    ) -> None:
        self._kernels, self._num_anchor = kernels, num_anchor
        first = layout.first_bounded_period
        bounded = [] if first is None else range(first, len(layout.num_staying))
        periods = [period for period in bounded if chosen.start < period * BOUND_EVERY <= chosen.end]
        self._borders = [period * BOUND_EVERY for period in periods]
        # Passing tokens are compared, in this round or in a later one.
        self.needs_scores = any(chosen.start < period * BOUND_EVERY for period in bounded)
        # Of the round's passing tokens, those of the blocks behind each border, up to the next.
        self._own = [
            Span(_num_passing(layout, chosen.start, start), _num_passing(layout, chosen.start, end))
            for start, end in itertools.pairwise((*self._borders, chosen.end))
        ]
        # Made here, and not at the first layer: a copy to the GPU would wait for what that has launched.
        self._candidates: list[Candidates] = []
        self._num_first = num_before - num_anchor + (self._own[0].start if self._own else 0)
        among = self._num_first
        for period, own in zip(periods, self._own, strict=True):
            self._candidates.append(Candidates.of([Span(0, among)], [layout.num_staying[period]], device))
            among = layout.num_staying[period] + len(own)

    def buffer_of(self, block: int) -> int:
        """Which of `buffers` the block's rows see a prefix of."""
        return sum(border <= block for border in self._borders)

    def buffers(self, first: Shared) -> Iterator[Shared]:
        """`first`, then one for each bounded period, made when it is asked for. The last is what the block behind the
        round sees.

        first: [anchor | what was handed on before | this round's passing tokens], in the prompt's order.
        """
        yield first
        if first.scores is None:
            return
        anchor, passing = first.keys_values[: self._num_anchor], first.keys_values[self._num_anchor :]
        num_new = self._own[-1].end if self._own else 0
        new, new_scores = passing[len(passing) - num_new :], first.scores[len(passing) - num_new :]
        among, among_scores = passing[: self._num_first], first.scores[: self._num_first]
        for own, candidates in zip(self._own, self._candidates, strict=True):
            # Of each KV head the best, in the prompt's order; of equals the earlier.
            rows = self._kernels.select(among_scores.T[None].contiguous(), candidates)
            staying = among.new_empty((len(rows), *among.shape[1:]))
            self._kernels.pack(among[:, 0], among[:, 1], rows, staying)
            buffer = torch.cat((anchor, staying, new[own.start : own.end]))
            among = buffer[self._num_anchor :]
            among_scores = torch.cat((among_scores.gather(0, rows.long()), new_scores[own.start : own.end]))
            yield Shared(buffer, among_scores)


def _num_passing(layout: Layout, first: int, end: int) -> int:
    return sum(map(layout.num_passing, range(first, end)))
