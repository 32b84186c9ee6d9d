"""What blocks hand on in one layer: chosen on each rank, brought to all.

shared = [anchor | passing tokens, in the prompt's order]    the same on every rank
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_apb.backends.handed_on import HandedOn, Shared
from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.backends.passing_bound import PassingBound
from sglang_apb.kernels import Kernels
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import Layout, Span
from sglang_apb.rank_group import Pending, RankGroup
from sglang_apb.selection.base import Selector


class Exchange:
    """Of one round of a prompt on one rank; used by all layers in turn.

    keys: of each own block with keys in the layers' k and v where they are. handed_on: of earlier rounds.
    """

    def __init__(
        self,
        layout: Layout,
        group: RankGroup,
        kernels: Kernels,
        selector: Selector,
        device: torch.device | str,
        keys: Mapping[int, Span],
        handed_on: HandedOn,
    ) -> None:
        self._layout, self._group, self._kernels, self._selector = layout, group, kernels, selector
        self._keys, self._handed_on = keys, handed_on
        # Blocks whose passing tokens are chosen now: this round's, or all so far.
        self._is_later = handed_on.ends_at(layout.num_cached)
        computed = layout.computed_blocks
        chosen = Span(computed.start if self._is_later else 0, computed.end)
        num_passing = {block: layout.num_passing(block) for block in range(chosen.start, chosen.end)}
        self._num_anchor = layout.num_anchor_keys(layout.num_blocks - 1)
        self._num_before = layout.num_shared_keys(chosen.start) if self._is_later else self._num_anchor
        self.bound = PassingBound(layout, chosen, self._num_anchor, self._num_before, kernels, device)
        # How many passing tokens each rank hands on.
        self._num_selected = [
            sum(num_passing.get(block, 0) for block in layout.blocks_of(rank)) for rank in range(group.size)
        ]
        # Made here, and not at the first layer: a copy to the GPU would wait for what that has launched.
        self._candidates = self._own_candidates(num_passing, device)
        if self.bound.needs_scores:
            _ = self._candidates.block_of_selected
        self._passing_order = self._order_of_passing(num_passing, device)

    def _own_candidates(self, num_passing: Mapping[int, int], device: torch.device | str) -> Candidates:
        spans, counts = [], []
        for block, keys in self._keys.items():
            if num_passing.get(block):
                first = self._layout.candidates(block).start - self._layout.blocks[block].start
                spans.append(Span(keys.start + first, keys.end))
                counts.append(num_passing[block])
        return Candidates.of(spans, counts, device)

    def _order_of_passing(self, num_passing: Mapping[int, int], device: torch.device | str) -> torch.Tensor:
        """For each passing token in the prompt's order its row among the gathered ones, which come rank after rank,
        each rank's in the order of its blocks, padded to the most.
        """
        most = max(self._num_selected)
        next_row = [rank * most for rank in range(self._group.size)]
        rows: list[int] = []
        for block, count in num_passing.items():
            owner = self._layout.owners[block]
            rows += range(next_row[owner], next_row[owner] + count)
            next_row[owner] += count
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def bring(self, layer: LayerRows, question: torch.Tensor, number: int) -> Shared:
        """Of layer `number`: anchor and passing tokens of all ranks, with scores where a bound needs them.

        The anchor is on its way while passing tokens are chosen.
        """
        num_shared = self._num_before + len(self._passing_order)
        earlier = self._handed_on.layers.pop(number) if self._is_later else None
        # Later rounds fill what is left of it: buffers that grew would leave holes in the allocator's memory.
        num_keys = num_shared if self._layout.is_last_round else max(num_shared, self._layout.most_shared_keys)
        room = earlier.with_room(num_keys) if earlier else layer.k.new_empty((num_keys, 2, *layer.k.shape[1:]))
        shared = room[:num_shared]
        anchor = [] if earlier else self._start_anchor(layer, shared)
        scores = self._exchange_passing(layer, question, shared[self._num_before :])
        if scores is not None and earlier is not None and earlier.scores is not None:
            scores = torch.cat((earlier.scores, scores))
        for pending in anchor:
            pending.wait()
        return Shared(shared, scores, room)

    def _start_anchor(self, layer: LayerRows, shared: torch.Tensor) -> list[Pending]:
        if self._layout.recomputed:
            _copy_key_value(layer, Span(0, self._num_anchor), shared[: self._num_anchor])
            return []
        sends = []
        for owner, tokens in self._layout.owner_runs(Span(0, self._num_anchor)):
            part = shared[tokens.start : tokens.end]
            if owner == self._group.rank:
                _copy_key_value(layer, self._keys_of_tokens(tokens), part)
            sends.append(self._group.broadcast(part, owner))
        return sends

    def _keys_of_tokens(self, tokens: Span) -> Span:
        """Own keys of consecutive context tokens; own blocks that touch in the prompt touch there."""
        for block, keys in self._keys.items():
            span = self._layout.blocks[block]
            if span.start <= tokens.start < span.end:
                start = keys.start + tokens.start - span.start
                return Span(start, start + len(tokens))
        raise ValueError(f"tokens [{tokens.start}, {tokens.end}) are not on rank {self._group.rank}")

    def _exchange_passing(self, layer: LayerRows, question: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """Chooses the own blocks' passing tokens, and brings all ranks' to `target`; gives their scores if needed.

        target: [num_passing_in_all, 2, num_kv_heads, head_dim], in the order of the prompt.
        """
        candidates = self._candidates
        alone = self._group.size == 1
        selected = target if alone else target.new_empty((candidates.num_selected, *target.shape[1:]))
        sent = [selected]
        if self.bound.needs_scores:
            sent.append(target.new_empty((candidates.num_selected, target.shape[2]), dtype=torch.float32))
        if candidates.num_selected:
            scores = self._selector.score(layer.k, question, candidates, self._kernels)
            rows = self._kernels.select(scores, candidates)
            self._kernels.pack(layer.k, layer.v, rows, selected)
            if self.bound.needs_scores:
                sent[1] = candidates.scores_of(rows, scores)
        if alone:
            return sent[1] if self.bound.needs_scores else None
        gathered = self._group.gather_together(sent, self._num_selected).wait()
        torch.index_select(gathered[0].flatten(0, 1), 0, self._passing_order, out=target)
        return gathered[1].flatten(0, 1)[self._passing_order] if self.bound.needs_scores else None


def _copy_key_value(layer: LayerRows, rows: Span, target: torch.Tensor) -> None:
    """target: [num_rows, 2, num_kv_heads, head_dim]"""
    for index, source in enumerate((layer.k, layer.v)):
        target[:, index] = source[rows.start : rows.end]
