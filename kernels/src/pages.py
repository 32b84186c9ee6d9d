"""Pages of the KV pool to one contiguous piece of memory and back, all buffers in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_BYTES = 16384
WIDE = 16  # bytes that one thread moves at a time, if all pages allow


@dataclass(frozen=True)
class PageBuffers:
    """A pool's buffers, each uint8 [num_pages, page_bytes], contiguous; made once a pool.

    `table` is what the kernels read, int64 [num_buffers, 3] on the buffers' device: address, page_bytes, and the
    page_bytes of all buffers before. Pages may differ in size between buffers.
    """

    buffers: tuple[torch.Tensor, ...]
    table: torch.Tensor

    @classmethod
    def of(cls, buffers: Sequence[torch.Tensor]) -> PageBuffers:
        entries, before = [], 0
        for buffer in buffers:
            page_bytes = buffer.shape[1]
            if buffer.dtype != torch.uint8 or not buffer.is_contiguous() or page_bytes % 2 or buffer.data_ptr() % 2:
                raise ValueError(f"need contiguous uint8 pages of an even size: {buffer.dtype}, {tuple(buffer.shape)}")
            entries.append((buffer.data_ptr(), page_bytes, before))
            before += page_bytes
        return cls(tuple(buffers), torch.tensor(entries, dtype=torch.int64, device=buffers[0].device))

    def part(self, first_buffer: int, num_buffers: int) -> PageBuffers:
        end = first_buffer + num_buffers
        return PageBuffers(self.buffers[first_buffer:end], self.table[first_buffer:end])

    @property
    def item_lens(self) -> tuple[int, ...]:
        """Bytes of one page of each buffer."""
        return tuple(buffer.shape[1] for buffer in self.buffers)


def gather_pages_reference(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor) -> None:
    """Writes pages `ids` of every buffer into `payload`: buffer after buffer, in the order of `ids`.

    ids: int64 [num_ids], contiguous, on the pool's device.
    payload: uint8 [num_ids * sum(pool.item_lens)], contiguous, at an even address, on the pool's device.
    """
    for buffer, part in _parts(pool, ids, payload):
        part.copy_(buffer[ids])


def scatter_pages_reference(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor) -> None:
    """The reverse of `gather_pages_reference`. `ids` must not repeat."""
    for buffer, part in _parts(pool, ids, payload):
        buffer[ids] = part


def gather_pages_triton(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor) -> None:
    _move(pool, ids, payload, scatter=False)


def scatter_pages_triton(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor) -> None:
    _move(pool, ids, payload, scatter=True)


def _parts(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(buffer, its part of `payload` as [num_ids, page_bytes]) for each buffer."""
    parts = payload.split([len(ids) * size for size in pool.item_lens])
    for buffer, part in zip(pool.buffers, parts, strict=True):
        yield buffer, part.view(len(ids), buffer.shape[1])


def _move(pool: PageBuffers, ids: torch.Tensor, payload: torch.Tensor, *, scatter: bool) -> None:
    if payload.numel() != len(ids) * sum(pool.item_lens):
        raise ValueError(f"{len(ids)} pages of {sum(pool.item_lens)} bytes do not fill {payload.numel()} bytes")
    addresses = [buffer.data_ptr() for buffer in pool.buffers]
    wide = all(number % WIDE == 0 for number in (*addresses, *pool.item_lens, payload.data_ptr()))
    words = payload.view(torch.int64 if wide else torch.int16)
    tile_words = TILE_BYTES // words.itemsize
    page_words = max(pool.item_lens) // words.itemsize
    tile_width = min(triton.next_power_of_2(page_words), tile_words)
    num_columns = triton.cdiv(page_words, tile_width)
    tile_pages = tile_words // tile_width
    _move_kernel[(triton.cdiv(len(ids), tile_pages) * num_columns, len(pool.buffers))](
        pool.table,
        ids,
        words,
        len(ids),
        num_columns,
        SCATTER=scatter,
        VECTOR=WIDE // words.itemsize if wide else 1,
        WORD_BYTES=words.itemsize,
        PAGES=tile_pages,
        WORDS=tile_width,
    )


@triton.jit(do_not_specialize=["num_ids"])  # transfers differ in it: nothing is to be compiled for each
def _move_kernel(
    table,
    ids,
    payload,
    num_ids,
    num_columns,
    SCATTER: tl.constexpr,
    VECTOR: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    PAGES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """PAGES pages of one buffer, WORDS words of each. All sizes are multiples of VECTOR words."""
    entry = table + tl.program_id(1) * 3
    pool = tl.multiple_of(tl.load(entry).to(payload.dtype), VECTOR * WORD_BYTES)
    page_words = tl.multiple_of(tl.load(entry + 1) // WORD_BYTES, VECTOR)
    # Counted from the first buffer of this call, which may be a part of the pool.
    words_before = tl.multiple_of((tl.load(entry + 2) - tl.load(table + 2)) // WORD_BYTES, VECTOR)

    place = (tl.program_id(0) // num_columns) * PAGES + tl.arange(0, PAGES)
    word = (tl.program_id(0) % num_columns) * WORDS + tl.arange(0, WORDS)
    page = tl.load(ids + place, mask=place < num_ids, other=0)
    mask = (place < num_ids)[:, None] & (word < page_words)[None, :]
    in_pool = pool + (page * page_words)[:, None] + word[None, :]
    in_payload = payload + (words_before * num_ids + place * page_words)[:, None] + word[None, :]
    if SCATTER:
        tl.store(in_pool, tl.load(in_payload, mask=mask), mask=mask)
    else:
        tl.store(in_payload, tl.load(in_pool, mask=mask), mask=mask)
