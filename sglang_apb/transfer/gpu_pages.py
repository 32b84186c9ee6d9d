"""Pages of some KV heads in GPU memory: where they lie in a pool, and in a block that is sent in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_apb.transfer.pages import CudaPages, run_of
from sglang_apb.transfer.wire import Block, PageIds


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

    def packed(self, part: range, block: Block, address: int) -> list[Any]:
        """Where a block's pages lie in one piece of memory: buffer after buffer, the heads `part` only."""
        from sglang_apb.kernels.page_copy import PagePlace

        places = []
        for length in self.row_lengths(part, self.num_rows(part))[block.first_buffer :][: block.num_buffers]:
            page_bytes = length * self.num_rows(part)
            places.append(PagePlace(address, page_bytes, length))
            address += page_bytes * block.num_pages
        return places

    def straight(self, part: range, block: Block, ids: PageIds) -> int | None:
        """Where a block begins in the pool, if it lies there as it is sent: all heads, of pages in a row."""
        where = run_of(ids)
        if where is None or part != self.heads or block.num_buffers != 1:
            return None
        return self._addresses[block.first_buffer] + where.start * self._item_lens[block.first_buffer]

    def _head_bytes(self, item_len: int) -> int:
        return item_len // (self.page_size * len(self.heads))


class UploadedIds:
    """Page ids on a GPU. A prompt's layers have the same: they are copied there once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ids: PageIds = np.empty(0, np.int64)
        self._there = torch.empty(0, dtype=torch.int64, device=device)

    def of(self, ids: PageIds) -> torch.Tensor:
        if not np.array_equal(ids, self._ids):
            self._ids, self._there = ids.copy(), torch.from_numpy(ids).to(self._device)
        return self._there
