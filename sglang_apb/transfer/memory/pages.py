"""The KV pool as rows of bytes: buffer b, page p is one row of `item_lens[b]` bytes.

buffers = [K of layer 0 | V of layer 0 | K of layer 1 | V of layer 1 | ...]
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from sglang_apb.transfer.protocol.wire import Block, Buffer, PageIds

# For ids that a GPU has to say: called when the bytes are final.
PageIdsLater: TypeAlias = Callable[[], PageIds]
Bytes: TypeAlias = npt.NDArray[np.uint8]

T = TypeVar("T")

# Measured best for DEALER/ROUTER over TCP. Smaller ones cost calls, larger ones leave the caches.
BLOCK_BYTES = 1 << 21
# A block that is only offered costs one launch, and a message: 3 ms over NVLink.
OFFER_BYTES = 1 << 30
# So that an offer, which has 4 bytes a page, is no longer than a block of data.
MAX_BLOCK_PAGES = BLOCK_BYTES // 4


class Pages(Protocol):
    """`gather` reads, `scatter` writes pages `ids` [n] of `num_buffers` buffers from `first_buffer` on.

    The bytes are, buffer after buffer, the pages in the order of `ids`. Both return when the bytes are there.
    """

    item_lens: tuple[int, ...]
    num_pages: int

    def gather(self, first_buffer: int, num_buffers: int, ids: PageIds) -> Bytes: ...

    def scatter(self, first_buffer: int, num_buffers: int, ids: PageIds, payload: Buffer) -> None: ...


class HostPages:
    """Pages in this process's memory. `buffers` are flat uint8 arrays whose length is whole pages."""

    def __init__(self, buffers: Sequence[Bytes], item_lens: Sequence[int]):
        self.item_lens = tuple(item_lens)
        self.buffers = [torch.from_numpy(buffer) for buffer in buffers]
        self._rows = [buffer.reshape(-1, size) for buffer, size in zip(buffers, item_lens, strict=True)]
        self.num_pages = min(len(rows) for rows in self._rows)
        self._spare: deque[Bytes] = deque()

    def gather(self, first_buffer: int, num_buffers: int, ids: PageIds) -> Bytes:
        rows = self._rows[first_buffer : first_buffer + num_buffers]
        where = run_of(ids)
        if where is not None and num_buffers == 1:
            # As it lies. Nothing writes there before the decode server says DONE, or gives the request up.
            return rows[0][where].reshape(-1)
        gathered = self._borrow(len(ids) * sum(row.shape[1] for row in rows))
        for source, target in _split(gathered, rows, len(ids)):
            # "clip" lets numpy write straight into `out`; every caller has checked the ids.
            np.take(source, ids, axis=0, out=target, mode="clip")
        return gathered

    def scatter(self, first_buffer: int, num_buffers: int, ids: PageIds, payload: Buffer) -> None:
        rows = self._rows[first_buffer : first_buffer + num_buffers]
        where = run_of(ids)
        for target, source in _split(np.frombuffer(payload, np.uint8), rows, len(ids)):
            target[ids if where is None else where] = source

    def _borrow(self, size: int) -> Bytes:
        """Memory that comes back here once ZMQ has sent it: touching fresh memory costs more than the copy."""
        if size > BLOCK_BYTES:
            return np.empty(size, np.uint8)
        memory = self._spare.pop() if self._spare else np.empty(BLOCK_BYTES, np.uint8)
        lent = memory[:size]
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return lent


def open_host_memory(ptrs: Sequence[int], lens: Sequence[int], item_lens: Sequence[int]) -> HostPages:
    """Pages at the addresses `ptrs` of this process. The owner of the memory must outlive the result."""
    arrays = [
        np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(ptr)) for ptr, size in zip(ptrs, lens, strict=True)
    ]
    return HostPages(arrays, item_lens)


def in_layers(keys: Sequence[T], values: Sequence[T]) -> list[T]:
    """SGLang's [K of all layers], [V of all layers] in the order of the buffers here."""
    return [buffer for layer in zip(keys, values, strict=True) for buffer in layer]


def layer_buffers(layers: Sequence[int]) -> list[range]:
    """The buffers of `layers`, which are in order: one range for each run of layers that follow each other."""
    runs: list[range] = []
    for layer in layers:
        if runs and runs[-1].stop == 2 * layer:
            runs[-1] = range(runs[-1].start, 2 * layer + 2)
        else:
            runs.append(range(2 * layer, 2 * layer + 2))
    return runs


def plan_blocks(
    item_lens: Sequence[int], buffers: range, first_page: int, num_pages: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Cuts [first_page, first_page + num_pages) of `buffers` into blocks of at most `block_bytes`, or of one page.

    No block has more than MAX_BLOCK_PAGES pages. Those of a buffer are about equal: a small one costs as much as a
    large one.
    """
    largest = max(item_lens[buffer] for buffer in buffers)
    most_pages = min(num_pages, max(1, block_bytes // largest), MAX_BLOCK_PAGES)
    num_blocks = -(-num_pages // most_pages)
    pages_per_block = -(-num_pages // num_blocks)
    buffers_per_block = max(1, block_bytes // (largest * pages_per_block))
    for buffer in range(buffers.start, buffers.stop, buffers_per_block):
        num_buffers = min(buffers_per_block, buffers.stop - buffer)
        for page in range(0, num_pages, pages_per_block):
            count = min(pages_per_block, num_pages - page)
            yield Block(buffer, num_buffers, first_page + page, count)


def largest_payload(pages: Pages, aux: Pages) -> int:
    """Upper bound in bytes for the payload of any frame between two servers with these pools."""
    return max(BLOCK_BYTES, max(pages.item_lens), sum(aux.item_lens))


def run_of(ids: PageIds) -> slice | None:
    """The pages as a slice, when they follow each other: moved at memory speed, rows of a token's K at half of it."""
    if len(ids) == 0 or ids[-1] - ids[0] != len(ids) - 1:
        return None
    start, end = int(ids[0]), int(ids[0]) + len(ids)
    return slice(start, end) if np.array_equal(ids, np.arange(start, end)) else None


def _split(flat, rows, num_ids: int):
    """(rows, its part of `flat` as [num_ids, bytes of a page]) for each buffer."""
    offset = 0
    for row in rows:
        size = num_ids * row.shape[1]
        yield row, flat[offset : offset + size].reshape(num_ids, row.shape[1])
        offset += size
