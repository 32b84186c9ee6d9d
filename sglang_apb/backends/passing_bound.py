"""The bound on passing tokens: what stays of them for the blocks of each period (`layout.Layout.num_staying`).

A token's score travels with its K and V, so every rank makes the same choice. For most prompts nothing is to be left
out, and all blocks see a prefix of one buffer; from the first bounded period on, each has a buffer of its own:

    bounded period   [anchor | the best of what earlier blocks handed on | P of the period's blocks]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import BOUND_EVERY, Layout, Span


class PassingBound:
    """Of one prompt; used by all layers in turn."""

    def __init__(self, layout: Layout, num_anchor: int, kernels: Kernels, device: torch.device | str) -> None:
        self._num_anchor, self._kernels = num_anchor, kernels
        first = layout.first_bounded_period
        self._periods = [] if first is None else list(range(first, len(layout.num_staying)))
        # What each bounded period's blocks hand on, and what comes to those that stay before it: everything until the
        # first one, later what the blocks of the period before handed on.
        self._own = [layout.passing_of(period) for period in self._periods]
        self._new = [Span(0, own.start) for own in self._own[:1]] + self._own[:-1]
        # Made here, and not at the first layer: a copy to the GPU would wait for what that has launched.
        self._candidates, num_staying = [], 0
        for period, new in zip(self._periods, self._new, strict=True):
            among, num_staying = Span(0, num_staying + len(new)), layout.num_staying[period]
            self._candidates.append(Candidates.of([among], [num_staying], device))

    @property
    def is_needed(self) -> bool:
        return bool(self._periods)

    def buffer_of(self, block: int) -> int:
        """Which of `buffers` the block's rows see a prefix of."""
        return max(block // BOUND_EVERY - self._periods[0] + 1, 0) if self._periods else 0

    def buffers(self, shared: torch.Tensor, scores: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """`shared`, then one for each bounded period, made when it is asked for: [num_rows, 2, num_kv_heads, head_dim].

        shared: [num_anchor + num_passing, 2, num_kv_heads, head_dim], in the prompt's order. scores: of its passing
        tokens, float32 [num_passing, num_kv_heads]; None where the bound is not needed.
        """
        yield shared
        if scores is None:
            return
        anchor, passing = shared[: self._num_anchor], shared[self._num_anchor :]
        staying, staying_scores = passing[:0], scores[:0]
        for own, new, candidates in zip(self._own, self._new, self._candidates, strict=True):
            among = torch.cat((staying, passing[new.start : new.end]))
            among_scores = torch.cat((staying_scores, scores[new.start : new.end]))
            # Of each KV head the best, in the prompt's order; of equals the earlier.
            rows = self._kernels.select(among_scores.T[None].contiguous(), candidates)
            staying_scores = among_scores.gather(0, rows.long())
            staying = among.new_empty((len(rows), *among.shape[1:]))
            self._kernels.pack(among[:, 0], among[:, 1], rows, staying)
            yield torch.cat((anchor, staying, passing[own.start : own.end]))
