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

from sglang_apb.transfer.memory.gpu_pages import CudaPages, GpuSide, UploadedIds
from sglang_apb.transfer.memory.heads import overlap
from sglang_apb.transfer.planes.cuda_ipc.handles import MappingError, Memory
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, PageIds


def export(pages: CudaPages, heads: range) -> Memory:
    """Handles on the memory of `pages`, which hold the model's KV `heads`.

    Raises MappingError when it cannot be shared: memory of PyTorch's expandable segments cannot.
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

    Raises MappingError when it cannot be mapped, ValueError when the pools' pages do not fit.
    """

    def __init__(self, memory: Memory, pages: CudaPages, heads: range, page_size: int):
        if len(memory.item_lens) != len(pages.item_lens):
            raise ValueError(f"{len(memory.item_lens)} buffers there, {len(pages.item_lens)} here")
        self.num_pages = memory.num_pages
        self._device = pages.buffers[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._mapped = self._map(memory.handles)
        try:
            self._set_up(memory, pages, heads, page_size)
        except Exception:
            self.close()
            raise

    def _set_up(self, memory: Memory, pages: CudaPages, heads: range, page_size: int) -> None:
        there = [self._mapped[handle] + offset for handle, offset in memory.places]
        self._there = GpuSide(there, memory.item_lens, range(*memory.heads), page_size)
        self._here = GpuSide.of(pages, heads, page_size)
        self._copies: dict[range, Any] = {}
        self._source_ids, self._target_ids = UploadedIds(self._device), UploadedIds(self._device)
        common, first_page = overlap(range(*memory.heads), heads), np.zeros(1, np.int64)
        for buffer in range(len(there)):  # Triton compiles now. SGLang's page 0 is nobody's: padding goes there.
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
                except MappingError:
                    for address in mapped:
                        runtime.cudaIpcCloseMemHandle(address)
                    raise
        return mapped

    def _copy_of(self, part: range) -> Any:
        from sglang_apb.kernels.page_copy import PageCopy

        if part not in self._copies:
            num_rows = max(side.num_rows(part) for side in (self._there, self._here))
            source, target = (side.places(part, num_rows) for side in (self._there, self._here))
            lengths = self._here.row_lengths(part, num_rows)
            self._copies[part] = PageCopy.between(source, target, num_rows, lengths, self._device)
        return self._copies[part]


def _checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call gave. Raises MappingError."""
    code, *values = result
    if int(code) != 0:
        raise MappingError(f"CUDA says {code!r}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
