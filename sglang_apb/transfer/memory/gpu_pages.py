"""Pages in GPU memory: where they lie in a pool, and the same bytes in one piece, as they are sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_apb.transfer.memory.pages import BLOCK_BYTES, Bytes, HostPages, run_of
from sglang_apb.transfer.protocol.wire import Block, Buffer, PageIds


class GpuSide:
    """One pool's pages, [page_size, heads, bytes of a head] in each buffer, of the model's KV `heads`."""

    def __init__(self, addresses: Sequence[int], item_lens: Sequence[int], heads: range, page_size: int):
        self.heads, self.page_size = heads, page_size
        self._addresses, self._item_lens = addresses, item_lens

    @classmethod
    def of(cls, pages: CudaPages, heads: range, page_size: int) -> GpuSide:
        return cls([buffer.data_ptr() for buffer in pages.buffers], pages.item_lens, heads, page_size)

    def num_rows(self, part: range) -> int:
        """Of a page: the heads `part` lie together if they are all, else once a token."""
        return 1 if part == self.heads else self.page_size

    def places(self, part: range, num_rows: int) -> list[Any]:
        """Where the heads `part` of each buffer's first page begin."""
        from sglang_apb.kernels.page_copy import PagePlace

        first = part.start - self.heads.start
        return [
            PagePlace(address + first * self._head_bytes(size), size, size // num_rows)
            for address, size in zip(self._addresses, self._item_lens, strict=True)
        ]

    def row_lengths(self, part: range, num_rows: int) -> list[int]:
        return [len(part) * self._head_bytes(size) * self.page_size // num_rows for size in self._item_lens]

    def page_lens(self, part: range) -> tuple[int, ...]:
        """Bytes of a page in each buffer, of the heads `part` alone."""
        return tuple(self.row_lengths(part, 1))

    def copy_of(self, part: range, address: int, device: torch.device, *, to_pool: bool) -> Any:
        """A PageCopy between the heads `part` of the pool and blocks in one piece at `address`."""
        from sglang_apb.kernels.page_copy import PageCopy, in_one_piece

        num_rows = self.num_rows(part)
        lengths = self.row_lengths(part, num_rows)
        ends = self.places(part, num_rows), in_one_piece(address, num_rows, lengths)
        return PageCopy.between(*(reversed(ends) if to_pool else ends), num_rows, lengths, device)

    def straight(self, part: range, block: Block, ids: PageIds) -> int | None:
        """Where a block begins in the pool, if it is one piece there: all heads, of pages in a row, in one buffer."""
        where = run_of(ids)
        if where is None or part != self.heads or block.num_buffers != 1:
            return None
        return self._addresses[block.first_buffer] + where.start * self._item_lens[block.first_buffer]

    def _head_bytes(self, item_len: int) -> int:
        return item_len // (self.page_size * len(self.heads))


# A layer of a long prompt is several blocks, each with pages of its own: the next layer finds their ids uploaded.
_NUM_UPLOADED = 32


class UploadedIds:
    """Page ids on a GPU, for kernels of the stream `reader` if that is another one than the current. A prompt's layers
    have the same: they are copied there once.
    """

    def __init__(self, device: torch.device, reader: torch.cuda.Stream | None = None):
        self._device, self._reader = device, reader
        self._uploaded: deque[tuple[PageIds, torch.Tensor]] = deque(maxlen=_NUM_UPLOADED)
        self._in_order = torch.arange(0, device=device)

    def of(self, ids: PageIds) -> torch.Tensor:
        """`ids` must not change afterwards."""
        found = next((pair for pair in self._uploaded if _are_same(ids, pair[0])), None)
        if found is None:
            found = ids, self._keep(torch.from_numpy(ids).to(self._device))
        else:
            self._uploaded = deque((pair for pair in self._uploaded if pair is not found), _NUM_UPLOADED)
        self._uploaded.append(found)  # the one that was used last is forgotten last
        return found[1]

    def in_order(self, num_ids: int) -> torch.Tensor:
        """Those of pages in one piece."""
        if num_ids > len(self._in_order):
            self._in_order = self._keep(torch.arange(num_ids, device=self._device))
        return self._in_order[:num_ids]

    def _keep(self, there: torch.Tensor) -> torch.Tensor:
        """It may be forgotten here before it is read there."""
        if self._reader is not None:
            there.record_stream(self._reader)
        return there


def _are_same(ids: PageIds, others: PageIds) -> bool:
    """Comparing all takes a tenth of a millisecond for a long prompt. Mostly they lie in the same place, or differ at
    an end.
    """
    if len(ids) != len(others):
        return False
    if ids.ctypes.data == others.ctypes.data and ids.strides == others.strides:
        return True
    is_alike = len(ids) == 0 or (ids[0] == others[0] and ids[-1] == others[-1])
    return bool(is_alike) and np.array_equal(ids, others)


class StagedPages:
    """`Pages` of some heads in GPU memory, moved through pinned host memory on a stream of its own, each way in one
    kernel. For one thread.

    KV must be final when `gather` is called: SGLang sends after it has waited for the batch's results.
    """

    def __init__(self, side: GpuSide, part: range, num_pages: int, device: torch.device):
        self.item_lens = side.page_lens(part)
        self.num_pages = num_pages
        self._side, self._part, self._device = side, part, device
        self._stream = torch.cuda.Stream(device)
        self._ids = UploadedIds(device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._reserve(BLOCK_BYTES)

    def warm_up(self) -> None:
        """Has Triton compile now what copies these pages, so that no request waits for it."""
        first_page = np.zeros(1, np.int64)
        for buffer in range(len(self.item_lens)):
            self.scatter(buffer, 1, first_page, self.gather(buffer, 1, first_page).data)

    def gather(self, first_buffer: int, num_buffers: int, ids: PageIds) -> Bytes:
        from sglang_apb.kernels.page_copy import copy_pages_triton

        staged = torch.empty(self._num_bytes(first_buffer, num_buffers, len(ids)), dtype=torch.uint8, pin_memory=True)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._reserve(len(staged))
            there = self._ids.of(ids), self._ids.in_order(len(ids))
            copy_pages_triton(self._from_pool, first_buffer, num_buffers, *there)
            staged.copy_(self._memory[: len(staged)], non_blocking=True)
        self._stream.synchronize()
        return staged.numpy()

    def scatter(self, first_buffer: int, num_buffers: int, ids: PageIds, payload: Buffer) -> None:
        from sglang_apb.kernels.page_copy import copy_pages_triton

        staged = torch.empty(self._num_bytes(first_buffer, num_buffers, len(ids)), dtype=torch.uint8, pin_memory=True)
        staged.numpy()[:] = np.frombuffer(payload, np.uint8)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._reserve(len(staged))
            self._memory[: len(staged)].copy_(staged, non_blocking=True)
            there = self._ids.in_order(len(ids)), self._ids.of(ids)
            copy_pages_triton(self._to_pool, first_buffer, num_buffers, *there)
        self._stream.synchronize()

    def _num_bytes(self, first_buffer: int, num_buffers: int, num_ids: int) -> int:
        return num_ids * sum(self.item_lens[first_buffer : first_buffer + num_buffers])

    def _reserve(self, num_bytes: int) -> None:
        """Memory for a block of so many bytes on the GPU."""
        if num_bytes <= len(self._memory):
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            self._from_pool, self._to_pool = (
                self._side.copy_of(self._part, self._memory.data_ptr(), self._device, to_pool=to_pool)
                for to_pool in (False, True)
            )


class CudaPages(StagedPages):
    """All of a pool in GPU memory. `buffers` are flat uint8 tensors whose length is whole pages."""

    def __init__(self, buffers: Sequence[torch.Tensor], item_lens: Sequence[int]):
        self.buffers = list(buffers)
        addresses = [buffer.data_ptr() for buffer in buffers]
        num_pages = min(len(buffer) // size for buffer, size in zip(buffers, item_lens, strict=True))
        super().__init__(GpuSide(addresses, item_lens, range(1), 1), range(1), num_pages, buffers[0].device)
        self.warm_up()


def open_pool(buffers: Sequence[torch.Tensor], lens: Sequence[int], item_lens: Sequence[int]) -> HostPages | CudaPages:
    """The pages of a KV pool: `buffers` contiguous tensors, of which the first `lens` bytes hold pages."""
    flat = [buffer.view(-1).view(torch.uint8)[:size] for buffer, size in zip(buffers, lens, strict=True)]
    if flat[0].device.type == "cuda":
        return CudaPages(flat, item_lens)
    return HostPages([buffer.numpy() for buffer in flat], item_lens)
