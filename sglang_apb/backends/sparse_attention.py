"""APB in one layer: these rows' q, k, v in, their attention out. Knows ranks and blocks, not SGLang.

Rows are a rank's [anchor copy | own blocks | question] (`layout.RankRows`). What a rank hands on:

    shared = [anchor | P_0 | P_1 | ... | P_(V-2)]    the same on every rank after the exchange
    block i sees a prefix of it: the anchor, and the passing tokens of blocks 0 .. i-1
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from sglang_apb.attention.base import AttentionEngine, Partial, Piece
from sglang_apb.kernels.candidates import Candidates
from sglang_apb.layout import Layout, Span
from sglang_apb.rank_group import Pending, RankGroup
from sglang_apb.selection.base import Selector

# Blocks are attended over what was handed on in groups of at most this many rows, or one block: it bounds the memory
# of a result that is merged at once, and fills a GPU many times over.
MAX_ROWS_AT_ONCE = 65536


@dataclass(frozen=True)
class LayerRows:
    """One layer's local rows, after RoPE: q [num_rows, num_q_heads, head_dim], k and v with num_kv_heads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class SparseAttention:
    """One prompt's attention on one rank; used by all layers in turn."""

    def __init__(self, layout: Layout, group: RankGroup, engine: AttentionEngine, selector: Selector) -> None:
        self.layout = layout
        self.rows = layout.rows_of(group.rank)
        self._group = group
        self._kernels = engine.kernels
        self._selector = selector
        self._num_passing = [layout.num_passing(block) for block in range(layout.num_blocks)]
        self._num_anchor = layout.num_anchor_keys(layout.num_blocks - 1)
        num_shared = self._num_anchor + sum(self._num_passing)
        self._num_shared = -(-num_shared // engine.key_multiple) * engine.key_multiple
        self._groups = self._groups_of_blocks()
        question = len(layout.question)
        self._own, self._question, self._question_itself, *self._before = engine.plan(
            [
                self._own_pieces(),
                [Piece(question, Span(0, len(self.rows.context)))],
                [Piece(question, Span(0, question), causal=True)],
                *([Piece(len(span), Span(0, keys)) for span, keys in group] for group in self._groups),
            ]
        )
        self._candidates: Candidates | None = None

    def _own_pieces(self) -> list[Piece]:
        """Causal attention within the recomputed anchor (if any) and within each own block, in row order."""
        spans = [self.rows.anchor] if self.layout.recomputed else []
        return [Piece(len(span), span, causal=True) for span in (*spans, *self.rows.blocks.values())]

    def _groups_of_blocks(self) -> list[list[tuple[Span, int]]]:
        """Own blocks that see something of `shared`: rows, and how long a prefix of it they see."""
        groups: list[list[tuple[Span, int]]] = []
        for block, span in self.rows.blocks.items():
            num_keys = self.layout.num_shared_keys(block)
            if num_keys == 0:
                continue
            if not groups or span.end - groups[-1][0][0].start > MAX_ROWS_AT_ONCE:
                groups.append([])
            groups[-1].append((span, num_keys))
        return groups

    def attend(self, layer: LayerRows) -> torch.Tensor:
        """Context and question in one pass: [num_rows, num_q_heads, head_dim]."""
        context, question = self.rows.context, self.rows.question
        out = torch.empty_like(layer.q, memory_format=torch.contiguous_format)
        take_shared = self._start_exchange(layer, layer.q[question.start :])
        own = self._attend_own(layer)
        answer = self._start_question(layer, layer.k[context.start : context.end], layer.v[context.start : context.end])
        self._finish_context(layer, own, take_shared(), out[: context.end])
        out[question.start :] = answer()
        return out

    def attend_context(self, layer: LayerRows) -> torch.Tensor:
        """The first of two passes. Rows are [anchor copy | own blocks]; the anchor's question chooses what to pass."""
        question = self.rows.anchor_question
        out = torch.empty_like(layer.q, memory_format=torch.contiguous_format)
        take_shared = self._start_exchange(layer, layer.q[question.start : question.end])
        self._finish_context(layer, self._attend_own(layer), take_shared(), out)
        return out

    def attend_question(self, layer: LayerRows, context_k: torch.Tensor, context_v: torch.Tensor) -> torch.Tensor:
        """The second of two passes. Rows are the question; context_k, context_v are the own blocks' cached rows."""
        return self._start_question(layer, context_k, context_v)()

    def _attend_own(self, layer: LayerRows) -> Partial | None:
        """Rows [anchor copy | own blocks]; None on a rank that has neither."""
        end = self.rows.context.end
        return self._own(layer.q[:end], layer.k, layer.v, layer.scale) if end else None

    def _finish_context(self, layer: LayerRows, own: Partial | None, shared: torch.Tensor, out: torch.Tensor) -> None:
        """Adds to each block what it sees of `shared`, and writes the rows [anchor copy | own blocks] to `out`."""
        if own is None:
            return
        start = self._groups[0][0][0].start if self._groups else len(out)
        out[:start] = own.out[:start]  # the anchor copy, and the prompt's first block: they see nothing else
        for group, attend in zip(self._groups, self._before, strict=True):
            rows = slice(group[0][0].start, group[-1][0].end)
            before = attend(layer.q[rows], shared[:, 0], shared[:, 1], layer.scale)
            self._kernels.merge((own.out[rows], before.out), (own.lse[rows], before.lse), out[rows])

    def _start_exchange(self, layer: LayerRows, question: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts sending anchor and passing tokens; the result waits and gives `shared`.

        shared: [num_anchor + num_passing_in_all, 2 (k, v), num_kv_heads, head_dim], and rows that nobody reads up to
        the engine's multiple.
        """
        shared = layer.k.new_empty((self._num_shared, 2, *layer.k.shape[1:]))
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
        candidates = self._own_candidates(layer.k.device)
        selected = layer.k.new_empty((candidates.num_selected, 2, *layer.k.shape[1:]))
        if candidates.num_selected:
            scores = self._selector.score(layer.k, question, candidates, self._kernels)
            self._kernels.pack(layer.k, layer.v, self._kernels.select(scores, candidates), selected)
        counts = [
            sum(self._num_passing[block] for block in self.layout.blocks_of(rank)) for rank in range(self._group.size)
        ]
        return self._group.gather_rows(selected, counts)

    def _own_candidates(self, device: torch.device) -> Candidates:
        if self._candidates is None:
            spans, counts = [], []
            for block, rows in self.rows.blocks.items():
                first = self.layout.candidates(block).start - self.layout.blocks[block].start
                spans.append(Span(rows.start + first, rows.end))
                counts.append(self._num_passing[block])
            self._candidates = Candidates.of(spans, counts, device)
        return self._candidates

    def _place_passing(self, by_rank: list[torch.Tensor], shared: torch.Tensor) -> None:
        """Ranks' tokens, which come in the order of their blocks, to the order of the prompt."""
        next_row = [0] * self._group.size
        start = self._num_anchor
        for owner, num_passing in zip(self.layout.owners, self._num_passing, strict=True):
            first = next_row[owner]
            shared[start : start + num_passing] = by_rank[owner][first : first + num_passing]
            next_row[owner] = first + num_passing
            start += num_passing

    def _start_question(
        self, layer: LayerRows, context_k: torch.Tensor, context_v: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Starts the question's attention over all ranks' keys; the result waits and gives its rows.

        The question is the last of the layer's rows. Each rank holds its own blocks' keys, context_k and context_v,
        which every question row sees. The question's own keys are the same on all ranks and count once: on rank 0.
        """
        start = layer.q.shape[0] - len(self.layout.question)
        q, k, v = layer.q[start:], layer.k[start:], layer.v[start:]
        partials = []
        if len(context_k):
            partials.append(self._question(q, context_k, context_v, layer.scale))
        if self._group.rank == 0:
            partials.append(self._question_itself(q, k, v, layer.scale))
        local = self._merge(partials, q)
        if self._group.size == 1:
            return lambda: local.out
        # out and lse travel together, in float32: [num_question_tokens, num_q_heads, head_dim + 1]
        packed = torch.cat((local.out.float(), local.lse[..., None]), dim=-1)
        pending = self._group.gather_rows(packed, [len(packed)] * self._group.size)
        return lambda: self._merge([Partial(part[..., :-1], part[..., -1]) for part in pending.wait()], q).out

    def _merge(self, partials: Iterable[Partial], q: torch.Tensor) -> Partial:
        """Attention of rows q over the union of the partials' keys; no partial at all is a row without keys."""
        partials = list(partials)
        merged = Partial(
            torch.zeros_like(q, memory_format=torch.contiguous_format),
            q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
        )
        if partials:
            self._kernels.merge(
                [part.out for part in partials], [part.lse for part in partials], merged.out, merged.lse
            )
        return merged


def _key_value(layer: LayerRows, rows: Span) -> torch.Tensor:
    """[num_rows, 2, num_kv_heads, head_dim]"""
    return torch.stack((layer.k[rows.start : rows.end], layer.v[rows.start : rows.end]), dim=1)
