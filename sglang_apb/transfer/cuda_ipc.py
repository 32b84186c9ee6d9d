"""A KV pool in GPU memory, read by a process of the same machine: CUDA's inter-process memory handles.

The decode rank's GPU copies pages straight from the other pool into its own, in one launch a block, over NVLink or in
the same GPU's memory. The prefill rank's GPU runs nothing for it. Memory that is mapped stays readable when the process
that it belongs to is killed, until it is unmapped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_apb.transfer import wire
from sglang_apb.transfer.direct import DirectError, Memory
from sglang_apb.transfer.heads import overlap
from sglang_apb.transfer.pages import CudaPages
from sglang_apb.transfer.wire import Block, PageIds


def export(pages: CudaPages, heads: range) -> Memory:
    """Handles on the memory of `pages`, which hold the model's KV `heads`.

    Raises DirectError when it cannot be shared: memory of PyTorch's expandable segments cannot.
    """
    from cuda.bindings import driver, runtime

    handles: dict[bytes, int] = {}
    places = []
    for buffer in pages.buffers:
        with torch.cuda.device(buffer.device):
            handle = bytes(_checked(runtime.cudaIpcGetMemHandle(buffer.data_ptr())).reserved)
            base, _ = _checked(driver.cuMemGetAddressRange(buffer.data_ptr()))
        places.append((handles.setdefault(handle, len(handles)), buffer.data_ptr() - int(base)))
    return Memory(
        wire.VERSION, list(handles), places, list(pages.item_lens), pages.num_pages, (heads.start, heads.stop)
    )


class CudaRemotePool:
    """Another process's pool as `memory` describes it, beside this one's `pages` of KV `heads`.

    Raises DirectError when it cannot be mapped, ValueError when the pools' pages do not fit.
    """

    def __init__(self, memory: Memory, pages: CudaPages, heads: range, page_size: int):
        if len(memory.item_lens) != len(pages.item_lens):
            raise ValueError(f"{len(memory.item_lens)} buffers there, {len(pages.item_lens)} here")
        self.num_pages = memory.num_pages
        self._device = pages.buffers[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._mapped = self._map(memory.handles)
        there = [self._mapped[handle] + offset for handle, offset in memory.places]
        here = [buffer.data_ptr() for buffer in pages.buffers]
        self._sides = (
            _Side(there, memory.item_lens, range(*memory.heads), page_size),
            _Side(here, pages.item_lens, heads, page_size),
        )
        self._copies: dict[range, Any] = {}
        self._source_ids, self._target_ids = _Uploaded(self._device), _Uploaded(self._device)
        common, first_page = overlap(range(*memory.heads), heads), np.zeros(1, np.int64)
        for buffer in range(len(here)):  # Triton compiles now. SGLang's page 0 is nobody's: padding goes there.
            self.pull(common, Block(buffer, 1, 0, 1), first_page, first_page)

    def pull(self, part: range, block: Block, source_ids: PageIds, target_ids: PageIds) -> None:
        from sglang_apb.kernels.page_copy import copy_pages_triton

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            copy_pages_triton(
                *(self._copy_of(part), block.first_buffer, block.num_buffers),
                *(self._source_ids.of(source_ids), self._target_ids.of(target_ids)),
            )
        self._stream.synchronize()

    def close(self) -> None:
        from cuda.bindings import runtime

        with torch.cuda.device(self._device):
            for address in self._mapped:
                _checked(runtime.cudaIpcCloseMemHandle(address))
        self._mapped = []

    def _map(self, handles: Sequence[bytes]) -> list[int]:
        from cuda.bindings import runtime

        mapped: list[int] = []
        with torch.cuda.device(self._device):
            for raw in handles:
                handle = runtime.cudaIpcMemHandle_t()
                handle.reserved = raw
                flags = runtime.cudaIpcMemLazyEnablePeerAccess
                try:
                    mapped.append(int(_checked(runtime.cudaIpcOpenMemHandle(handle, flags))))
                except DirectError:
                    for address in mapped:
                        runtime.cudaIpcCloseMemHandle(address)
                    raise
        return mapped

    def _copy_of(self, part: range) -> Any:
        from sglang_apb.kernels.page_copy import PageCopy

        if part not in self._copies:
            num_rows = 1 if all(side.heads == part for side in self._sides) else self._sides[0].page_size
            source, target = (side.places(part, num_rows) for side in self._sides)
            lengths = self._sides[1].lengths(part, num_rows)
            self._copies[part] = PageCopy.between(source, target, num_rows, lengths, self._device)
        return self._copies[part]


class _Uploaded:
    """Page ids on a GPU: a prompt's layers have the same, and copying them costs a third of copying the pages."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ids: PageIds = np.empty(0, np.int64)
        self._there = torch.empty(0, dtype=torch.int64, device=device)

    def of(self, ids: PageIds) -> torch.Tensor:
        if not np.array_equal(ids, self._ids):
            self._ids, self._there = ids.copy(), torch.from_numpy(ids).to(self._device)
        return self._there


class _Side:
    """One pool's pages: [page_size, heads, bytes of a head] in each buffer."""

    def __init__(self, addresses: Sequence[int], item_lens: Sequence[int], heads: range, page_size: int):
        self.heads, self.page_size = heads, page_size
        self._addresses, self._item_lens = addresses, item_lens

    def places(self, part: range, num_rows: int) -> list[Any]:
        """Where the heads `part` of each buffer's first page begin."""
        from sglang_apb.kernels.page_copy import PagePlace

        first = part.start - self.heads.start
        return [
            PagePlace(address + first * self._head_bytes(size), size, size // num_rows)
            for address, size in zip(self._addresses, self._item_lens, strict=True)
        ]

    def lengths(self, part: range, num_rows: int) -> list[int]:
        return [len(part) * self._head_bytes(size) * self.page_size // num_rows for size in self._item_lens]

    def _head_bytes(self, item_len: int) -> int:
        return item_len // (self.page_size * len(self.heads))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call gave. Raises DirectError."""
    code, *values = result
    if int(code) != 0:
        raise DirectError(f"CUDA says {code!r}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
