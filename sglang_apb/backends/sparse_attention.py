"""APB in one layer: these rows' q, k, v in, their attention out. Knows ranks and blocks, not SGLang.

Rows are a rank's [anchor copy | own blocks | question] (`layout.RankRows`). What a rank hands on:

    shared = [anchor | P_0 | P_1 | ... | P_(V-2)]    the same on every rank after the exchange
    block i sees a prefix of it: the anchor, and the passing tokens of blocks 0 .. i-1

Where a bound leaves some of them out, late blocks see a prefix of another buffer (passing_bound.py).

A round computes a part of the prompt. The first one, of a context whose first tokens are cached, has as a rank's keys
[cached own tokens | rows]: what earlier blocks hand on is chosen again from their cached keys, and a block that is
cached in part sees its cached tokens beside its rows. Later ones are given what was handed on before (handed_on.py),
and the last has the cached tokens for its question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_apb.attention.base import AttentionEngine, Partial, Piece
from sglang_apb.backends.exchange import Exchange
from sglang_apb.backends.handed_on import HandedOn, Shared
from sglang_apb.backends.layer_rows import LayerRows, nothing
from sglang_apb.layout import Layout, Span, num_rows
from sglang_apb.rank_group import RankGroup
from sglang_apb.selection.base import Selector

# Blocks are attended together, up to this: queries that keep a GPU busy, and their keys, of which each block has a
# copy then (attention/flashinfer.py). More would only take memory.
QUERIES_A_CALL = 8192
KEYS_A_CALL = 65536


@dataclass(frozen=True)
class _Group:
    """Own blocks that follow each other in a rank's rows, and the keys handed on that each of them sees."""

    rows: Span
    pieces: tuple[Piece, ...]
    buffer: int  # of `PassingBound.buffers`

    def with_block(self, rows: Span, num_keys: int, buffer: int) -> _Group | None:
        """With another block behind; None when that is too much for one call, or its keys lie elsewhere."""
        if buffer != self.buffer:
            return None
        together = Span(self.rows.start, rows.end)
        all_keys = num_keys + sum(len(piece.keys) for piece in self.pieces)
        if len(together) > QUERIES_A_CALL or all_keys > KEYS_A_CALL:
            return None
        return _Group(together, (*self.pieces, Piece(len(rows), Span(0, num_keys))), buffer)


class SparseAttention:
    """One round of a prompt's attention on one rank; used by all layers in turn.

    handed_on: of earlier rounds; what this one hands on comes to it.
    """

    def __init__(
        self,
        layout: Layout,
        group: RankGroup,
        engine: AttentionEngine,
        selector: Selector,
        device: torch.device | str,
        handed_on: HandedOn | None = None,
    ) -> None:
        self.layout = layout
        self.rows = layout.rows_of(group.rank)
        self._group = group
        self._kernels = engine.kernels
        self._handed_on = handed_on or HandedOn()
        # Own tokens, in front of the rows' keys: a later round sees of them what was handed on, and its question all.
        sees_cached = layout.is_last_round or not self._handed_on.ends_at(layout.num_cached)
        self.num_cached = num_rows(layout.cached_on(group.rank)) if sees_cached else 0
        self._keys = self._keys_of_blocks()
        self._exchange = Exchange(layout, group, engine.kernels, selector, device, self._keys, self._handed_on)
        self._seeing = self._groups()
        self._plan(engine)

    def _plan(self, engine: AttentionEngine) -> None:
        """All calls of a layer, at once: plans of a prompt before end here."""
        cached_part, question = self._piece_of_cached_part(), len(self.rows.question)
        calls: list[list[Sequence[Piece]]] = [
            [self._own_pieces()],
            [[Piece(question, Span(0, len(self._context_keys)))]] if question else [],
            [[Piece(question, Span(0, question), causal=True)]] if question else [],
            [[cached_part]] if cached_part else [],
            [group.pieces for group in self._seeing],
        ]
        planned = iter(engine.plan([*itertools.chain.from_iterable(calls)]))
        own, self._question, self._question_itself, cached, self._before = [
            [*itertools.islice(planned, len(pieces))] for pieces in calls
        ]
        (self._own,) = own
        self._cached_part = (cached_part, cached[0]) if cached_part else None

    def _keys_of_blocks(self) -> dict[int, Span]:
        """Of each own block with keys here: where they are. They follow each other."""
        present = self.layout.computed_context
        if self.num_cached:
            present = Span(0, present.end)
        keys, start = {}, len(self.rows.anchor)
        for block in self.layout.blocks_of(self._group.rank):
            if num_keys := len(self.layout.blocks[block].within(present)):
                keys[block] = Span(start, start + num_keys)
                start += num_keys
        return keys

    @property
    def _context_keys(self) -> Span:
        start = len(self.rows.anchor)
        return Span(start, start + num_rows(self._keys.values()))

    def _own_pieces(self) -> list[Piece]:
        """Causal attention within the recomputed anchor (if any) and within each own block, in row order."""
        spans = [self.rows.anchor] if self.layout.recomputed else []
        return [
            Piece(len(span), Span(self.num_cached + span.start, self.num_cached + span.end), causal=True)
            for span in (*spans, *self.rows.blocks.values())
        ]

    def _piece_of_cached_part(self) -> Piece | None:
        """What the first own rows see of the cached tokens of their block, if it is cached in part."""
        for block, rows in self.rows.blocks.items():
            if (start := self._keys[block].start) < self.num_cached:
                return Piece(len(rows), Span(start, self.num_cached))
        return None

    def _groups(self) -> list[_Group]:
        """Own blocks that see something of what is handed on, in row order; only the prompt's first may not."""
        groups: list[_Group] = []
        for block, rows in self.rows.blocks.items():
            if not (num_keys := self.layout.num_shared_keys(block)):
                continue
            buffer = self._exchange.bound.buffer_of(block)
            larger = groups[-1].with_block(rows, num_keys, buffer) if groups else None
            if larger is None:
                groups.append(_Group(rows, (Piece(len(rows), Span(0, num_keys)),), buffer))
            else:
                groups[-1] = larger
        return groups

    def attend(self, layer: LayerRows, meanwhile: Callable[[], None] = nothing, number: int = 0) -> torch.Tensor:
        """The round's rows, context and question, in one pass: [num_rows, num_q_heads, head_dim].

        `meanwhile` starts what else is to be sent to other ranks. It is called before attention over what was handed
        on, which loses little to it: many small thread blocks. Attention over own blocks, and matrix products, give
        each multiprocessor its share beforehand; where NCCL holds some of them, their shares come after all others',
        and the kernel takes twice as long (docs/performance.md). That is also why the exchange is waited for first.
        number: the layer's.
        """
        if not len(self.layout.computed_context):
            return self.attend_last(layer, meanwhile)
        question = self.rows.question
        out = torch.empty_like(layer.q, memory_format=torch.contiguous_format)
        shared = self._exchange.bring(layer, layer.q[question.start :], number)
        own_lse = self._attend_own(layer, out)
        answer = self._start_question(layer, *self._context_of(layer)) if len(question) else None
        meanwhile()
        self._add_shared(layer, shared, out, own_lse, number)
        if answer is not None:
            out[question.start :] = answer()
        return out

    def attend_last(self, layer: LayerRows, meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
        """Of the last layer, in one pass: the question's rows alone, [num_question_tokens, num_q_heads, head_dim].

        Only the prompt's last row is read after it. Of the others their K and V are needed, and no attention, so
        nothing is handed on. A round without the question gives one row of zeros, which nobody reads.
        """
        if not self.layout.is_last_round:
            meanwhile()
            return layer.q.new_zeros((1, *layer.q.shape[1:]))
        answer = self._start_question(layer, *self._context_of(layer))
        meanwhile()
        return answer()

    def _context_of(self, layer: LayerRows) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all tokens of own blocks."""
        keys = self._context_keys
        return layer.k[keys.start : keys.end], layer.v[keys.start : keys.end]

    def attend_context(self, layer: LayerRows, meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
        """The first of two passes. Rows are [anchor copy | own blocks]; the anchor's question chooses what to pass."""
        question = self.rows.anchor_question
        out = torch.empty_like(layer.q, memory_format=torch.contiguous_format)
        shared = self._exchange.bring(layer, layer.q[question.start : question.end], 0)
        own_lse = self._attend_own(layer, out)
        meanwhile()
        self._add_shared(layer, shared, out, own_lse, 0)
        return out

    def attend_question(self, layer: LayerRows, context_k: torch.Tensor, context_v: torch.Tensor) -> torch.Tensor:
        """The second of two passes. Rows are the question; context_k, context_v are the own blocks' cached rows."""
        return self._start_question(layer, context_k, context_v)()

    def _attend_own(self, layer: LayerRows, out: torch.Tensor) -> torch.Tensor:
        """Writes rows [anchor copy | own blocks] of `out`, over their own keys; gives the log-sum-exp of these rows."""
        end = self.rows.context.end
        if end == 0:
            return layer.q.new_empty((0, layer.q.shape[1]), dtype=torch.float32)
        lse = self._own(layer.q[:end], layer.k, layer.v, layer.scale, out[:end]).lse
        if self._cached_part is not None:
            piece, attend = self._cached_part
            rows = slice(0, piece.num_queries)  # of the rank's first block with rows
            cached = attend(layer.q[rows], layer.k, layer.v, layer.scale)
            own_lse = lse[rows].clone()
            self._kernels.merge((out[rows], cached.out), (own_lse, cached.lse), out[rows], lse[rows])
        return lse

    def _add_shared(
        self, layer: LayerRows, shared: Shared, out: torch.Tensor, own_lse: torch.Tensor, number: int
    ) -> None:
        """Adds to each block, in `out`, what it sees of what was handed on, and keeps that for the next round."""
        buffers = self._exchange.bound.buffers(shared)
        at, buffer = 0, next(buffers)
        for group, attend in zip(self._seeing, self._before, strict=True):
            while at < group.buffer:  # own blocks ascend
                at, buffer = at + 1, next(buffers)
            rows = slice(group.rows.start, group.rows.end)
            keys, values = buffer.keys_values[:, 0], buffer.keys_values[:, 1]
            before = attend(layer.q[rows], keys, values, layer.scale)
            self._kernels.merge((out[rows], before.out), (own_lse[rows], before.lse), out[rows])
        if not self.layout.is_last_round:
            *_, self._handed_on.layers[number] = buffer, *buffers

    def _start_question(
        self, layer: LayerRows, context_k: torch.Tensor, context_v: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Starts the question's attention over all ranks' keys; the result waits and gives its rows.

        The question is the last of the layer's rows. Each rank holds its own blocks' keys, context_k and context_v,
        which every question row sees. The question's own keys are the same on all ranks and count once: on rank 0.
        """
        num_tokens = len(self.layout.question)
        q, k, v = layer.q[-num_tokens:], layer.k[-num_tokens:], layer.v[-num_tokens:]
        partials = []
        if len(context_k):
            partials += [attend(q, context_k, context_v, layer.scale) for attend in self._question]
        if self._group.rank == 0:
            partials += [attend(q, k, v, layer.scale) for attend in self._question_itself]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._group.size == 1:
            self._merge(partials, out)
            return lambda: out
        # out and lse travel together, in float32; rows of whole 16 bytes, as Triton compiles others anew
        packed = q.new_empty((*q.shape[:2], q.shape[2] + 4), dtype=torch.float32)
        self._merge(partials, packed[..., :-4], packed[..., -4])
        pending = self._group.gather_padded(packed, [len(packed)] * self._group.size)

        def answer() -> torch.Tensor:
            self._merge([Partial(part[..., :-4], part[..., -4]) for part in pending.wait().unbind()], out)
            return out

        return answer

    def _merge(self, partials: Sequence[Partial], out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Writes attention over the union of the partials' keys; without any partial the rows see no key."""
        if partials:
            self._kernels.merge([part.out for part in partials], [part.lse for part in partials], out, lse)
            return
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
