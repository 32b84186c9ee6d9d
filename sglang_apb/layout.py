"""How a prompt is split: lengths -> blocks, owners, anchor, question. Pure arithmetic, no tensors.

    [0 ........................ context_end) [context_end ... num_tokens)
    |  context: V blocks, each on one rank |  question, on every rank   |
    [0, anchor)                                 anchor: the context's first tokens, seen by every block
       candidates of a block                    its tokens outside the anchor, of which `passing` are handed on

Rows of block i attend to the anchor before the block, the passing tokens of blocks 0..i-1, and their own
block causally. The question attends to the whole context and, causally, to itself. No key is seen twice.

A round computes some of a prompt's tokens. Those before them are in the KV cache, those behind come in later rounds,
the question in the last:

    [0 ..... num_cached) [num_cached ..... round_end) [round_end ..... num_tokens)

With a bound on passing tokens, at every BOUND_EVERY-th block border the best by score of all that earlier blocks
handed on stay, for the blocks of the period behind it:

    | period 0: blocks 0 .. 15 | period 1: blocks 16 .. 31     | period 2: ...
      P_0 .. P_(i-1)             best of (P_0 .. P_15), P_16 ..  best of (those of period 1, P_16 .. P_31), P_32 ..
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sglang_apb.config import ALL, DEFAULT_QUESTION_TOKENS, ApbConfig

# With anchor_mode="recomputed" the question is inserted after this many tokens: a chat template's head
# (APB, modeling_llama.py: 16 for Llama's).
ANCHOR_HEAD = 16
# Blocks of a period. Counted from the prompt's start, whatever its length and the number of ranks, so that what a block
# sees does not change when text is appended.
BOUND_EVERY = 16
# The preset `paper`: so many blocks, but none shorter than that; anchor and passing follow the prompt's length, up to a
# multiple of PAPER_STEP, which suits attention kernels' tiles.
PAPER_NUM_BLOCKS, PAPER_MIN_BLOCK, PAPER_STEP = 16, 512, 128


class LayoutError(ValueError):
    """The prompt cannot be laid out; the text names the value and the remedy."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end)."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def within(self, other: Span) -> Span:
        """What both have; empty where they have nothing."""
        start = min(max(self.start, other.start), self.end)
        return Span(start, max(min(self.end, other.end), start))


def num_rows(spans: Iterable[Span]) -> int:
    return sum(map(len, spans))


@dataclass(frozen=True)
class RankRows:
    """The rows one rank computes, in this order: [anchor copy | own blocks | question]; of a block that is cached in
    part its other tokens.
    """

    anchor_copy: tuple[Span, ...]
    block_tokens: dict[int, Span]
    question_tokens: Span

    @cached_property
    def anchor(self) -> Span:
        """Rows of the recomputed anchor."""
        return Span(0, num_rows(self.anchor_copy))

    @cached_property
    def blocks(self) -> dict[int, Span]:
        """Rows of each own block."""
        rows, start = {}, len(self.anchor)
        for block, tokens in self.block_tokens.items():
            rows[block] = Span(start, start + len(tokens))
            start += len(tokens)
        return rows

    @cached_property
    def context(self) -> Span:
        """Rows of all own blocks."""
        return Span(len(self.anchor), len(self.anchor) + num_rows(self.block_tokens.values()))

    @cached_property
    def question(self) -> Span:
        return Span(self.context.end, self.context.end + len(self.question_tokens))

    @property
    def anchor_question(self) -> Span:
        """Rows of the question inside the recomputed anchor."""
        start = len(self.anchor_copy[0])
        return Span(start, start + len(self.question_tokens))

    @property
    def tokens(self) -> tuple[Span, ...]:
        """The prompt's tokens behind the rows."""
        return (*self.anchor_copy, *self.block_tokens.values(), self.question_tokens)

    @property
    def positions(self) -> tuple[Span, ...]:
        """The rows' positions, which RoPE turns them by."""
        return (self.anchor, *self.block_tokens.values(), self.question_tokens)


@dataclass(frozen=True)
class Layout:
    """One prompt's split. All numbers count tokens; `owners[i]` is the rank of block i."""

    num_tokens: int
    context_end: int
    anchor: int
    passing: int
    blocks: tuple[Span, ...]
    owners: tuple[int, ...]
    num_ranks: int
    recomputed: bool = False
    max_passing: int | None = None  # at a period's start
    num_cached: int = 0  # the context's first tokens, whose K and V are there
    round_end: int | None = None  # None: the prompt's

    @property
    def question(self) -> Span:
        return Span(self.context_end, self.num_tokens)

    @property
    def is_last_round(self) -> bool:
        """Whether the question is computed."""
        return self.round_end is None

    @property
    def computed_context(self) -> Span:
        """What this round computes of the context; empty where all of it is cached."""
        end = self.context_end if self.round_end is None else self.round_end
        return Span(min(self.num_cached, end), end)

    @property
    def computed_blocks(self) -> Span:
        """Numbers of the blocks with tokens in this round."""
        computed = self.computed_context
        first = sum(block.end <= computed.start for block in self.blocks)
        return Span(first, first + sum(block.start < computed.end for block in self.blocks[first:]))

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def blocks_of(self, rank: int) -> tuple[int, ...]:
        """Numbers of the blocks that `rank` owns, in the prompt's order."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)

    def num_anchor_keys(self, block: int) -> int:
        """How many anchor keys rows of `block` see: the anchor before the block, or the recomputed one."""
        if self.recomputed:
            return num_rows(self.anchor_copy) if block else 0
        return min(self.anchor, self.blocks[block].start)

    def num_shared_keys(self, block: int) -> int:
        """How many keys before the block its rows see: the anchor's, then what earlier blocks hand on.

        A block that starts inside the anchor has no passing tokens before it: its anchor is all that it sees.
        """
        period = block // BOUND_EVERY
        return self.num_anchor_keys(block) + self.num_staying[period] + self._num_passing_of(period, block)

    @cached_property
    def num_staying(self) -> tuple[int, ...]:
        """How many passing tokens of earlier periods stay, per KV head, for the blocks of each period."""
        staying = [0]
        for period in range((self.num_blocks - 1) // BOUND_EVERY):
            staying.append(staying[-1] + self._num_passing_of(period))
            if self.max_passing is not None:
                staying[-1] = min(staying[-1], self.max_passing)
        return tuple(staying)

    @cached_property
    def first_bounded_period(self) -> int | None:
        """The first for which not everything stays."""
        staying = self.num_staying
        return next(
            (
                period
                for period in range(1, len(staying))
                if staying[period] < staying[period - 1] + self._num_passing_of(period - 1)
            ),
            None,
        )

    @property
    def num_bounded_keys(self) -> int:
        """At most, of what a bounded period's blocks see; 0 where everything stays."""
        if self.first_bounded_period is None:
            return 0
        return self.anchor + max(self.num_staying) + BOUND_EVERY * self.passing

    @property
    def most_shared_keys(self) -> int:
        """At most, of what a block sees of those before it."""
        return self.num_bounded_keys or self.num_shared_keys(self.num_blocks - 1)

    def _num_passing_of(self, period: int, end: int | None = None) -> int:
        """Passing tokens of the period's blocks, before block `end` if given."""
        first = period * BOUND_EVERY
        last = min(first + BOUND_EVERY, self.num_blocks) if end is None else end
        return sum(map(self.num_passing, range(first, last)))

    def candidates(self, block: int) -> Span:
        """The tokens of `block` that may be handed on: those that no later block sees as anchor."""
        span = self.blocks[block]
        return Span(min(max(span.start, self.anchor), span.end), span.end)

    def num_passing(self, block: int) -> int:
        """How many tokens, per KV head, `block` hands on; the last block has nobody to hand them to."""
        if block == self.num_blocks - 1:
            return 0
        return min(self.passing, len(self.candidates(block)))

    @property
    def anchor_copy(self) -> tuple[Span, ...]:
        """The recomputed anchor's tokens in the order of its rows: head, question, rest; empty when shared.

        Its rows stand at positions 0, 1, 2, ... (APB, modeling_llama.py:1246-1257).
        """
        if not self.recomputed:
            return ()
        head = min(ANCHOR_HEAD, self.anchor)
        return (Span(0, head), self.question, Span(head, self.anchor))

    def rows_of(self, rank: int) -> RankRows:
        """The rows that `rank` computes."""
        new = {i: self.blocks[i].within(self.computed_context) for i in self.blocks_of(rank)}
        question = self.question if self.is_last_round else Span(0, 0)
        return RankRows(self.anchor_copy, {i: span for i, span in new.items() if len(span)}, question)

    def cached_on(self, rank: int) -> tuple[Span, ...]:
        """Cached tokens of the blocks that `rank` owns, in the prompt's order."""
        spans = (self.blocks[i].within(Span(0, self.num_cached)) for i in self.blocks_of(rank))
        return tuple(span for span in spans if len(span))

    def owner_runs(self, span: Span) -> list[tuple[int, Span]]:
        """`span` of the context cut where the owning rank changes: (rank, tokens), in order."""
        runs: list[tuple[int, Span]] = []
        for owner, block in zip(self.owners, self.blocks, strict=True):
            part = block.within(span)
            if not len(part):
                continue
            if runs and runs[-1][0] == owner:
                runs[-1] = (owner, Span(runs[-1][1].start, part.end))
            else:
                runs.append((owner, part))
        return runs

    @cached_property
    def attention_pairs(self) -> int:
        """(query, key) pairs of one layer and head, over all ranks, recomputed anchors counted once a rank."""
        pairs = 0
        for i, span in enumerate(self.blocks):
            num_cached = min(max(self.num_cached - span.start, 0), len(span))
            pairs += (len(span) - num_cached) * self.num_shared_keys(i)
            pairs += _triangle(len(span)) - _triangle(num_cached)
        pairs += len(self.question) * self.context_end + _triangle(len(self.question))
        return pairs + self.num_ranks * _triangle(num_rows(self.anchor_copy))

    @property
    def attention_share(self) -> float:
        """Work of attention as a share of exact causal attention's, of all tokens."""
        return self.attention_pairs / _triangle(self.num_tokens)

    @cached_property
    def most_context_on_a_rank(self) -> int:
        """Context tokens of the rank that owns most of them."""
        return max(num_rows(self.rows_of(rank).block_tokens.values()) for rank in range(self.num_ranks))

    def owned_pages(self, rank: int, page_size: int) -> list[tuple[int, int]]:
        """Half-open ranges of the request's pages that `rank` holds; the question's are rank 0's.

        Blocks start and end on pages, so every page has one owner.
        """
        spans = [self.blocks[i] for i in self.blocks_of(rank)] + ([self.question] if rank == 0 else [])
        return _merged([(span.start // page_size, -(-span.end // page_size)) for span in spans])


def plan(
    num_tokens: int,
    config: ApbConfig,
    *,
    num_ranks: int = 1,
    page_size: int = 1,
    question_tokens: int | None = None,
    num_cached: int = 0,
    round_end: int | None = None,
) -> Layout:
    """The layout of a prompt of `num_tokens`. `question_tokens` overrides the configuration's (one request's wish).

    Block borders are page borders; the question grows by up to a page to make it so. num_cached, round_end: see
    `Layout`. Raises LayoutError when the question leaves no whole page of context.
    """
    wanted = question_tokens or num_question_tokens(num_tokens, config)
    context_end = (num_tokens - wanted) // page_size * page_size
    if context_end <= 0:
        raise LayoutError(
            f"question_tokens={wanted} leaves no context in a prompt of {num_tokens} tokens: "
            f"give at most {max(num_tokens - page_size, 0)}, or leave it out"
        )
    blocks = _split(context_end, config.block, page_size)
    anchor = min(_paper_length(num_tokens, 64) if config.anchor is None else config.anchor, context_end)
    recomputed = config.anchor_mode == "recomputed"
    if recomputed:  # the copy stands in front of every block but the first, which must hold the original
        anchor = min(anchor, len(blocks[0]))
    passing = _paper_length(num_tokens, 128) if config.passing is None else config.passing
    return Layout(
        num_tokens=num_tokens,
        context_end=context_end,
        anchor=anchor,
        passing=context_end if passing == ALL else int(passing),
        blocks=blocks,
        owners=tuple(_owner(i, num_ranks) for i in range(len(blocks))),
        num_ranks=num_ranks,
        recomputed=recomputed,
        max_passing=config.bound,
        num_cached=num_cached,
        round_end=round_end,
    )


def num_question_tokens(num_tokens: int, config: ApbConfig) -> int:
    """How many trailing tokens of a prompt ask, where the request does not say.

    The server's own setting takes at most half of a prompt, so that every prompt can be laid out.
    """
    if config.question_tokens is not None:
        return max(min(config.question_tokens, num_tokens // 2), 1)
    return max(min(DEFAULT_QUESTION_TOKENS, num_tokens // 4), 1)


def _split(context_end: int, block: int | None, page_size: int) -> tuple[Span, ...]:
    num_pages = context_end // page_size
    if block is None:
        num_blocks = max(min(PAPER_NUM_BLOCKS, context_end // PAPER_MIN_BLOCK, num_pages), 1)
        borders = [i * num_pages // num_blocks for i in range(num_blocks + 1)]
    else:
        borders = [*range(0, num_pages, -(-block // page_size)), num_pages]
    return tuple(Span(a * page_size, b * page_size) for a, b in itertools.pairwise(borders))


def _paper_length(num_tokens: int, divisor: int) -> int:
    return -(-num_tokens // (divisor * PAPER_STEP)) * PAPER_STEP


def _owner(block: int, num_ranks: int) -> int:
    """Deals blocks 0..R-1, then R-1..0: late blocks see more passing tokens, and each rank gets its share."""
    turn, seat = divmod(block, num_ranks)
    return seat if turn % 2 == 0 else num_ranks - 1 - seat


def _triangle(num_rows: int) -> int:
    return num_rows * (num_rows + 1) // 2


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
