"""APB in one layer: these rows' q, k, v in, their attention out. Knows ranks and blocks, not SGLang.

Rows are a rank's [anchor copy | own blocks | question] (`layout.RankRows`). What a rank hands on:

    shared = [anchor | P_0 | P_1 | ... | P_(V-2)]    the same on every rank after the exchange
    block i sees a prefix of it: the anchor, and the passing tokens of blocks 0 .. i-1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_apb.attention.base import AttentionEngine, Partial, Segment, merge
from sglang_apb.layout import Layout, Span
from sglang_apb.rank_group import Pending, RankGroup
from sglang_apb.selection.base import Selector, take


@dataclass(frozen=True)
class LayerRows:
    """One layer's local rows, after RoPE: q [num_rows, num_q_heads, head_dim], k and v with num_kv_heads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    def segment(self, rows: Span, *, causal: bool = False, keys: Span | None = None) -> Segment:
        keys = rows if keys is None else keys
        return Segment(
            self.q[rows.start : rows.end], self.k[keys.start : keys.end], self.v[keys.start : keys.end], causal
        )


class SparseAttention:
    """One prompt's attention on one rank; used by all layers in turn."""

    def __init__(self, layout: Layout, group: RankGroup, engine: AttentionEngine, selector: Selector) -> None:
        self.layout = layout
        self.rows = layout.rows_of(group.rank)
        self._group = group
        self._engine = engine
        self._selector = selector
        self._num_passing = [layout.num_passing(block) for block in range(layout.num_blocks)]
        self._num_anchor = layout.num_anchor_keys(layout.num_blocks - 1)

    def attend(self, layer: LayerRows) -> torch.Tensor:
        """Context and question in one pass: [num_rows, num_q_heads, head_dim]."""
        question = self.rows.question
        take_shared = self._start_exchange(layer, layer.q[question.start : question.end])
        own = self._attend_own(layer)
        answer = self._start_question(layer, layer.segment(question, keys=self.rows.context))
        out = torch.empty_like(layer.q)
        self._finish_context(layer, own, take_shared(), out)
        out[question.start : question.end] = answer()
        return out

    def attend_context(self, layer: LayerRows) -> torch.Tensor:
        """The first of two passes. Rows are [anchor copy | own blocks]; the anchor's question chooses what to pass."""
        question = self.rows.anchor_question
        take_shared = self._start_exchange(layer, layer.q[question.start : question.end])
        own = self._attend_own(layer)
        out = torch.empty_like(layer.q)
        self._finish_context(layer, own, take_shared(), out)
        return out

    def attend_question(self, layer: LayerRows, context_k: torch.Tensor, context_v: torch.Tensor) -> torch.Tensor:
        """The second of two passes. Rows are the question; context_k, context_v are the own blocks' cached rows."""
        return self._start_question(layer, Segment(layer.q, context_k, context_v))()

    def _attend_own(self, layer: LayerRows) -> list[Partial]:
        """Causal attention within the recomputed anchor (if any) and within each own block, in row order."""
        spans = [self.rows.anchor] if self.layout.recomputed else []
        segments = [layer.segment(span, causal=True) for span in [*spans, *self.rows.blocks.values()]]
        return self._engine.attend(segments, layer.scale)

    def _finish_context(self, layer: LayerRows, own: list[Partial], shared: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to each block what it sees of `shared`, and writes its rows of `out`."""
        if self.layout.recomputed:
            anchor = self.rows.anchor
            out[anchor.start : anchor.end] = own.pop(0).out
        segments = []
        for block, span in self.rows.blocks.items():
            visible = shared[: self._num_shared_keys(block)]
            segments.append(Segment(layer.q[span.start : span.end], visible[:, 0], visible[:, 1]))
        before = self._engine.attend(segments, layer.scale)
        for span, *partials in zip(self.rows.blocks.values(), own, before, strict=True):
            out[span.start : span.end] = merge(partials).out

    def _num_shared_keys(self, block: int) -> int:
        """How long a prefix of `shared` rows of `block` see.

        A block that starts inside the anchor has no passing tokens before it: its anchor is all that it sees.
        """
        return self.layout.num_anchor_keys(block) + sum(self._num_passing[:block])

    def _start_exchange(self, layer: LayerRows, question: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts sending anchor and passing tokens; the result waits and gives `shared`.

        shared: [num_anchor + num_passing_in_all, 2 (k, v), num_kv_heads, head_dim].
        """
        num_shared = self._num_anchor + sum(self._num_passing)
        shared = layer.k.new_empty((num_shared, 2, *layer.k.shape[1:]))
        anchor = self._start_anchor(layer, shared)
        passing = self._start_passing(layer, question)

        def finish() -> torch.Tensor:
            for pending in anchor:
                pending.wait()
            self._place_passing(passing.wait(), shared)
            return shared

        return finish

    def _start_anchor(self, layer: LayerRows, shared: torch.Tensor) -> list[Pending]:
        if self.layout.recomputed:
            shared[: self._num_anchor] = _key_value(layer, Span(0, self._num_anchor))
            return []
        sends = []
        for owner, tokens in self.layout.owner_runs(Span(0, self._num_anchor)):
            part = shared[tokens.start : tokens.end]
            if owner == self._group.rank:
                part.copy_(_key_value(layer, self._rows_of_tokens(tokens)))
            sends.append(self._group.broadcast(part, owner))
        return sends

    def _rows_of_tokens(self, tokens: Span) -> Span:
        """Own rows of consecutive context tokens; own blocks that touch in the prompt touch in the rows."""
        for block, span in self.rows.block_tokens.items():
            if span.start <= tokens.start < span.end:
                start = self.rows.blocks[block].start + tokens.start - span.start
                return Span(start, start + len(tokens))
        raise ValueError(f"tokens [{tokens.start}, {tokens.end}) are not on rank {self._group.rank}")

    def _start_passing(self, layer: LayerRows, question: torch.Tensor) -> Pending:
        """Chooses and starts sending the own blocks' passing tokens: one [num, 2, num_kv_heads, head_dim] a rank."""
        selected = [layer.k.new_empty((0, 2, *layer.k.shape[1:]))]
        for block, rows in self.rows.blocks.items():
            num_passing = self._num_passing[block]
            if num_passing == 0:
                continue
            candidates = self.layout.candidates(block)
            start = rows.start + candidates.start - self.layout.blocks[block].start
            k, v = layer.k[start : rows.end], layer.v[start : rows.end]
            indices = self._selector.select(k, question, num_passing)
            selected.append(torch.stack((take(k, indices), take(v, indices)), dim=1))
        counts = [
            sum(self._num_passing[block] for block in self.layout.blocks_of(rank)) for rank in range(self._group.size)
        ]
        return self._group.gather_rows(torch.cat(selected), counts)

    def _place_passing(self, by_rank: list[torch.Tensor], shared: torch.Tensor) -> None:
        """Ranks' tokens, which come in the order of their blocks, to the order of the prompt."""
        next_row = [0] * self._group.size
        start = self._num_anchor
        for owner, num_passing in zip(self.layout.owners, self._num_passing, strict=True):
            first = next_row[owner]
            shared[start : start + num_passing] = by_rank[owner][first : first + num_passing]
            next_row[owner] = first + num_passing
            start += num_passing

    def _start_question(self, layer: LayerRows, over_context: Segment) -> Callable[[], torch.Tensor]:
        """Starts the question's attention over all ranks' keys; the result waits and gives its rows.

        Each rank holds its own blocks' keys, which every question row sees. The question's own keys are the same
        on all ranks and count once: on rank 0.
        """
        question = Span(layer.q.shape[0] - len(self.layout.question), layer.q.shape[0])
        segments = [over_context]
        if self._group.rank == 0:
            segments.append(layer.segment(question, causal=True))
        local = merge(self._engine.attend(segments, layer.scale))
        if self._group.size == 1:
            return lambda: local.out
        # out and lse travel together, in float32: [num_question_tokens, num_q_heads, head_dim + 1]
        packed = torch.cat((local.out.float(), local.lse[..., None]), dim=-1)
        pending = self._group.gather_rows(packed, [len(packed)] * self._group.size)

        def finish() -> torch.Tensor:
            return merge([Partial(part[..., :-1], part[..., -1]) for part in pending.wait()]).out.to(layer.q.dtype)

        return finish


def _key_value(layer: LayerRows, rows: Span) -> torch.Tensor:
    """[num_rows, 2, num_kv_heads, head_dim]"""
    return torch.stack((layer.k[rows.start : rows.end], layer.v[rows.start : rows.end]), dim=1)
