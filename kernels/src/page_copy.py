"""Pages of a KV pool to another one, which may be on another GPU or in another process, or to one contiguous piece of
memory and back, all buffers in one launch.

A page is rows of equal length: one where all of it is copied, one a token where some of its heads are.

    page of the source, 4 heads    |h0 h1 h2 h3|h0 h1 h2 h3|      row_bytes: from token to token
    page of the target, 2 heads    |h2 h3|h2 h3|                  length: of two heads

In one piece, the pages of a buffer follow those of the buffer before:

    n pages of 3 buffers           |n * k0|n * v0|n * k1|         bytes_before: 0, k0, k0 + v0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_BYTES = 16384
WIDE = 16  # bytes that one thread moves at a time, if all numbers allow


@dataclass(frozen=True)
class PagePlace:
    """One buffer: row r of page p begins at `address + p * page_bytes + r * row_bytes`.

    When n pages are copied at once, it lies n times `bytes_before` further, counted from the first buffer of them.
    """

    address: int
    page_bytes: int
    row_bytes: int
    bytes_before: int = 0

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.address, self.bytes_before, self.page_bytes, self.row_bytes


def in_one_piece(address: int, num_rows: int, lengths: Sequence[int]) -> list[PagePlace]:
    """Places of buffers whose pages, `num_rows` rows of lengths[b] bytes each, lie one after the other."""
    places, before = [], 0
    for length in lengths:
        places.append(PagePlace(address, num_rows * length, length, before))
        before += num_rows * length
    return places


@dataclass(frozen=True)
class PageCopy:
    """From where to where, for each buffer; made once for two pools.

    `table` is what the kernel reads, int64 [num_buffers, 9] on the GPU that runs it: address, bytes_before, page_bytes
    and row_bytes of the source, the same of the target, and bytes of a row. `num_rows` are a page's.
    """

    table: torch.Tensor
    num_rows: int
    lengths: tuple[int, ...]
    word_bytes: int

    @classmethod
    def between(
        cls,
        sources: Sequence[PagePlace],
        targets: Sequence[PagePlace],
        num_rows: int,
        lengths: Sequence[int],
        device: torch.device,
    ) -> PageCopy:
        """Raises ValueError when a place or length is not a multiple of 2 bytes."""
        rows = [(*s.numbers, *t.numbers, length) for s, t, length in zip(sources, targets, lengths, strict=True)]
        numbers = [number for row in rows for number in row]
        if any(number % 2 for number in numbers):
            raise ValueError(f"pages of an odd size or place cannot be copied: {rows}")
        word_bytes = 8 if all(number % WIDE == 0 for number in numbers) else 2
        return cls(torch.tensor(rows, dtype=torch.int64, device=device), num_rows, tuple(lengths), word_bytes)


def copy_pages_reference(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    source_ids: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Pages `source_ids` [num_ids] of each source become pages `target_ids` of the target.

    sources, targets: each uint8 [num_pages, num_rows, length], with any strides. `target_ids` must not repeat.
    """
    for source, target in zip(sources, targets, strict=True):
        target[target_ids] = source[source_ids]


def copy_pages_triton(
    copy: PageCopy, first_buffer: int, num_buffers: int, source_ids: torch.Tensor, target_ids: torch.Tensor
) -> None:
    """The same for buffers [first_buffer, first_buffer + num_buffers) of `copy`; ids int64, on its device."""
    row_words = max(copy.lengths[first_buffer : first_buffer + num_buffers]) // copy.word_bytes
    tile_words = TILE_BYTES // copy.word_bytes
    tile_width = min(triton.next_power_of_2(row_words), tile_words)
    num_columns = triton.cdiv(row_words, tile_width)
    tile_rows = tile_words // tile_width
    num_rows = len(source_ids) * copy.num_rows
    _copy_kernel[(triton.cdiv(num_rows, tile_rows) * num_columns, num_buffers)](
        copy.table[first_buffer:],
        source_ids,
        target_ids,
        num_rows,
        copy.num_rows,
        num_columns,
        WORD=tl.int64 if copy.word_bytes == 8 else tl.int16,
        VECTOR=WIDE // 8 if copy.word_bytes == 8 else 1,
        ROWS=tile_rows,
        WORDS=tile_width,
    )


@triton.jit(do_not_specialize=["num_rows"])  # transfers differ in it: nothing is to be compiled for each
def _copy_kernel(
    table,
    source_ids,
    target_ids,
    num_rows,
    rows_of_page,
    num_columns,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ROWS rows of one buffer, WORDS words of each. All sizes are multiples of VECTOR words."""
    entry = table + tl.program_id(1) * 9
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    row = (tl.program_id(0) // num_columns) * ROWS + tl.arange(0, ROWS)
    word = (tl.program_id(0) % num_columns) * WORDS + tl.arange(0, WORDS)
    is_row = row < num_rows
    row_in_page = row % rows_of_page
    row_words = tl.multiple_of(tl.load(entry + 8) // word_bytes, VECTOR)
    mask = is_row[:, None] & (word < row_words)[None, :]

    source_page = tl.load(source_ids + row // rows_of_page, mask=is_row, other=0)
    target_page = tl.load(target_ids + row // rows_of_page, mask=is_row, other=0)
    num_pages = num_rows // rows_of_page
    source = _starts(table, entry, num_pages, source_page, row_in_page, WORD, VECTOR)
    target = _starts(table + 4, entry + 4, num_pages, target_page, row_in_page, WORD, VECTOR)
    tl.store(target[:, None] + word[None, :], tl.load(source[:, None] + word[None, :], mask=mask), mask=mask)


@triton.jit
def _starts(first, entry, num_pages, page, row_in_page, WORD: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the rows' first words. `first` is the entry of the first buffer of this call."""
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    base = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WORD)), VECTOR * word_bytes)
    words_before = tl.multiple_of((tl.load(entry + 1) - tl.load(first + 1)) // word_bytes, VECTOR)
    page_words = tl.multiple_of(tl.load(entry + 2) // word_bytes, VECTOR)
    row_words = tl.multiple_of(tl.load(entry + 3) // word_bytes, VECTOR)
    return base + num_pages * words_before + page * page_words + row_in_page * row_words
