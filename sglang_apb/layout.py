"""How a prompt is split: lengths -> blocks, owners, anchor, question. Pure arithmetic, no tensors.

    [0 ........................ context_end) [context_end ... num_tokens)
    |  context: V blocks, each on one rank |  question, on every rank   |
    [0, anchor)                                 anchor: the context's first tokens, seen by every block
       candidates of a block                    its tokens outside the anchor, of which `passing` are handed on

Rows of block i attend to the anchor before the block, the passing tokens of blocks 0..i-1, and their own
block causally. The question attends to the whole context and, causally, to itself. No key is seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sglang_apb.config import ALL, DEFAULT_NUM_BLOCKS, DEFAULT_QUESTION_TOKENS, LENGTH_STEP, ApbConfig

# With anchor_mode="recomputed" the question is inserted after this many tokens: a chat template's head
# (APB, modeling_llama.py: 16 for Llama's).
ANCHOR_HEAD = 16


class LayoutError(ValueError):
    """The prompt cannot be laid out; the text names the value and the remedy."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end)."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


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

    @property
    def question(self) -> Span:
        return Span(self.context_end, self.num_tokens)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def blocks_of(self, rank: int) -> tuple[int, ...]:
        """Numbers of the blocks that `rank` owns, in the prompt's order."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)

    def anchor_of(self, block: int) -> Span:
        """The anchor tokens that rows of `block` see: those that stand before the block."""
        return Span(0, min(self.anchor, self.blocks[block].start))

    def candidates(self, block: int) -> Span:
        """The tokens of `block` that may be handed on: those that no later block sees as anchor."""
        span = self.blocks[block]
        return Span(min(max(span.start, self.anchor), span.end), span.end)

    def num_passing(self, block: int) -> int:
        """How many tokens, per KV head, `block` hands on; the last block has nobody to hand them to."""
        if block == self.num_blocks - 1:
            return 0
        return min(self.passing, len(self.candidates(block)))

    @cached_property
    def anchor_rows(self) -> tuple[int, ...]:
        """Prompt positions of the recomputed anchor's rows: head, question, rest; empty when shared."""
        if not self.recomputed:
            return ()
        head = min(ANCHOR_HEAD, self.anchor)
        return (*range(head), *range(self.context_end, self.num_tokens), *range(head, self.anchor))

    @cached_property
    def attention_pairs(self) -> int:
        """(query, key) pairs of one layer and head, over all ranks, recomputed anchors counted once a rank."""
        pairs = 0
        handed_on = 0
        for i, span in enumerate(self.blocks):
            before = (len(self.anchor_rows) if i else 0) if self.recomputed else len(self.anchor_of(i))
            pairs += len(span) * (before + handed_on) + _triangle(len(span))
            handed_on += self.num_passing(i)
        pairs += len(self.question) * self.context_end + _triangle(len(self.question))
        return pairs + self.num_ranks * _triangle(len(self.anchor_rows))

    @property
    def attention_share(self) -> float:
        """Work of attention as a share of exact causal attention's."""
        return self.attention_pairs / _triangle(self.num_tokens)

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
) -> Layout:
    """The layout of a prompt of `num_tokens`. `question_tokens` overrides the configuration's (one request's wish).

    Block borders are page borders; the question grows by up to a page to make it so.
    Raises LayoutError when the question leaves no whole page of context.
    """
    wanted = question_tokens or config.question_tokens or min(DEFAULT_QUESTION_TOKENS, num_tokens // 4)
    context_end = (num_tokens - max(wanted, 1)) // page_size * page_size
    if context_end <= 0:
        raise LayoutError(
            f"question_tokens={wanted} leaves no context in a prompt of {num_tokens} tokens: "
            f"give at most {max(num_tokens - page_size, 0)}, or leave it out"
        )
    blocks = _split(context_end, config, page_size)
    anchor = min(_follow(config.anchor, num_tokens, 64), context_end)
    recomputed = config.anchor_mode == "recomputed"
    if recomputed:  # the copy stands in front of every block but the first, which must hold the original
        anchor = min(anchor, len(blocks[0]))
    passing = context_end if config.passing == ALL else _follow(config.passing, num_tokens, 128)
    return Layout(
        num_tokens=num_tokens,
        context_end=context_end,
        anchor=anchor,
        passing=passing,
        blocks=blocks,
        owners=tuple(_owner(i, len(blocks), num_ranks, config.balance) for i in range(len(blocks))),
        num_ranks=num_ranks,
        recomputed=recomputed,
    )


def _follow(given: int | str | None, num_tokens: int, divisor: int) -> int:
    """`given`, or num_tokens / divisor rounded up to LENGTH_STEP."""
    if given is not None:
        return int(given)
    return -(-num_tokens // (divisor * LENGTH_STEP)) * LENGTH_STEP


def _split(context_end: int, config: ApbConfig, page_size: int) -> tuple[Span, ...]:
    num_pages = context_end // page_size
    if config.block is not None:
        pages = -(-config.block // page_size)
        borders = [*range(0, num_pages, pages), num_pages]
    else:
        num_blocks = min(config.num_blocks or DEFAULT_NUM_BLOCKS, num_pages)
        borders = [i * num_pages // num_blocks for i in range(num_blocks + 1)]
    return tuple(Span(a * page_size, b * page_size) for a, b in zip(borders, borders[1:], strict=False))


def _owner(block: int, num_blocks: int, num_ranks: int, balance: str) -> int:
    """Zigzag deals blocks 0..R-1, then R-1..0: late blocks see more passing tokens, and each rank gets its share."""
    if balance == "contiguous":
        return block * num_ranks // num_blocks
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
