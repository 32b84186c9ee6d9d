"""A block of pages from GPU to GPU by NCCL: over InfiniBand, RoCE, NVLink or TCP, whatever NCCL finds.

Communicators do not block: one whose other side is gone is given up without it (`ncclCommAbort`). NCCL does not
encrypt, and authenticates nobody.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from sglang_apb.transfer.exchange import NUM_SLOTS, SLOT_BYTES, ExchangeError, Ticket
from sglang_apb.transfer.gpu_pages import GpuSide, UploadedIds
from sglang_apb.transfer.pages import CudaPages
from sglang_apb.transfer.wire import Block, PageIds

if TYPE_CHECKING:
    from sglang_apb.kernels.page_copy import PageCopy

logger = logging.getLogger(__name__)

PREFILL, DECODE = 0, 1
_IN_PROGRESS = 7  # ncclInProgress (nccl.h)
_UINT8 = 1
_CONNECT_S = 20.0
_CALL_S = 2.0
# NCCL's kernel takes that many multiprocessors of a GPU that computes beside it; a network is no faster with more.
_MAX_CTAS = 4


def new_id() -> bytes:
    """Opens a port to which both sides of a communicator connect; the id says where."""
    return bytes(_library().ncclGetUniqueId())


class Communicator:
    """Of two processes. Making it returns when the other side has made its own; raises ExchangeError."""

    def __init__(self, unique_id: bytes, rank: int, device: torch.device):
        from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

        self._lib, self._peer = _library().lib, 1 - rank
        self.stream = torch.cuda.Stream(device)
        self._comm = ctypes.c_void_p()
        config = wrapper.ncclConfig_t.create()
        config.blocking, config.maxCTAs = 0, _MAX_CTAS
        identity = wrapper.ncclUniqueId.from_buffer_copy(unique_id)
        with torch.cuda.device(device):
            code = self._lib.ncclCommInitRankConfig(ctypes.byref(self._comm), 2, identity, rank, ctypes.byref(config))
            try:
                self._wait(code, _CONNECT_S)
                self._connect(device)
            except ExchangeError:
                self.abort()
                raise

    def send(self, address: int, num_bytes: int) -> None:
        """Queues it on `stream`."""
        self._call(self._lib.ncclSend, address, num_bytes, _CALL_S)

    def receive(self, address: int, num_bytes: int) -> None:
        self._call(self._lib.ncclRecv, address, num_bytes, _CALL_S)

    def abort(self, memory: torch.Tensor | None = None) -> None:
        """Ends what is on its way: in a thread of its own, since that waits for the GPU. It has `memory` till then: a
        block may still be written there.
        """
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            threading.Thread(target=_abort, args=(self._lib, comm, memory), name="kv-abort", daemon=True).start()

    def _connect(self, device: torch.device) -> None:
        """The first send connects both sides, for which each has to wait for the other."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        function = self._lib.ncclRecv if self._peer == PREFILL else self._lib.ncclSend
        self._call(function, byte.data_ptr(), 1, _CONNECT_S)
        deadline = time.monotonic() + _CONNECT_S
        while not self.stream.query():
            if time.monotonic() > deadline:
                raise ExchangeError(f"the other side has not come within {_CONNECT_S:g} s")
            time.sleep(0.001)

    def _call(self, function: Any, address: int, num_bytes: int, seconds: float) -> None:
        if not self._comm:
            raise ExchangeError("the communicator is closed")
        code = function(address, num_bytes, _UINT8, self._peer, self._comm, self.stream.cuda_stream)
        self._wait(code, seconds)

    def _wait(self, code: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        state = ctypes.c_int(code)
        while state.value == _IN_PROGRESS:
            if time.monotonic() > deadline:
                raise ExchangeError(f"NCCL has not finished a call within {seconds:g} s")
            self._lib.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        if state.value:
            raise ExchangeError(f"NCCL: {_library().ncclGetErrorString(state.value)}")


def _abort(library: Any, comm: ctypes.c_void_p, memory: torch.Tensor | None) -> None:
    library.ncclCommAbort(comm)
    del memory


@cache
def _library() -> Any:
    from sglang.srt.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    library = NCCLLibrary()
    for name, arguments in (
        ("ncclCommAbort", [ctypes.c_void_p]),
        ("ncclCommGetAsyncError", [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]),
    ):
        getattr(library.lib, name).argtypes = arguments
    return library


@dataclass(frozen=True)
class _Prepared:
    copy: PageCopy
    source_ids: torch.Tensor
    target_ids: torch.Tensor

    def run_on(self, stream: torch.cuda.Stream) -> None:
        from sglang_apb.kernels.page_copy import copy_pages_triton

        for tensor in (self.copy.table, self.source_ids, self.target_ids):
            tensor.record_stream(stream)  # it may be forgotten here before it is read there
        with torch.cuda.stream(stream):
            copy_pages_triton(self.copy, 0, len(self.copy.lengths), self.source_ids, self.target_ids)


class _Channel:
    """One side of a pair: its pool, and slots of memory through which blocks go."""

    def __init__(self, unique_id: bytes, rank: int, pages: CudaPages, heads: range, page_size: int):
        self._device = pages.buffers[0].device
        self._side = GpuSide.of(pages, heads, page_size)
        self._pool_ids = UploadedIds(self._device)
        self._own_stream = torch.cuda.Stream(self._device)
        self._communicator = Communicator(unique_id, rank, self._device)
        with torch.cuda.device(self._device):
            self._slots = torch.empty(NUM_SLOTS, SLOT_BYTES, dtype=torch.uint8, device=self._device)

    def close(self) -> None:
        self._communicator.abort(self._slots)

    def _num_bytes(self, part: range, block: Block) -> int:
        return block.num_pages * sum(place.page_bytes for place in self._side.packed(part, block, 0))

    def _prepare(self, part: range, block: Block, slot: int, ids: PageIds, *, to_pool: bool) -> _Prepared:
        """What copies a block between a slot and the pool. Uploaded on a stream that waits for no other side."""
        from sglang_apb.kernels.page_copy import PageCopy

        num_rows = self._side.num_rows(part)
        buffers = slice(block.first_buffer, block.first_buffer + block.num_buffers)
        in_pool = self._side.places(part, num_rows)[buffers]
        packed = self._side.packed(part, block, self._slots[slot].data_ptr())
        lengths = self._side.row_lengths(part, num_rows)[buffers]
        source, target = (packed, in_pool) if to_pool else (in_pool, packed)
        with torch.cuda.stream(self._own_stream):
            copy = PageCopy.between(source, target, num_rows, lengths, self._device)
            in_order = torch.arange(len(ids), device=self._device)
            pool_ids = self._pool_ids.of(ids)
        self._own_stream.synchronize()
        return _Prepared(copy, *((in_order, pool_ids) if to_pool else (pool_ids, in_order)))


class NcclSender(_Channel):
    """Prefill's side."""

    def __init__(self, unique_id: bytes, pages: CudaPages, heads: range, page_size: int):
        super().__init__(unique_id, PREFILL, pages, heads, page_size)
        self._next_slot = 0
        self._sending: deque[torch.cuda.Event] = deque()

    def send(self, part: range, block: Block, ids: PageIds) -> None:
        self._check_taken()
        with torch.cuda.device(self._device):
            if (address := self._side.straight(part, block, ids)) is None:
                slot = self._take_slot()
                address = self._slots[slot].data_ptr()
                # On one stream with the sends, so that a slot is not written again before it is sent.
                self._prepare(part, block, slot, ids, to_pool=False).run_on(self._communicator.stream)
            self._send(address, self._num_bytes(part, block))

    def send_nothing(self, num_bytes: int) -> None:
        """Zeros: the other side waits for so much, of a request that is gone here."""
        self._check_taken()
        slot = self._slots[self._take_slot()]
        with torch.cuda.device(self._device):
            with torch.cuda.stream(self._communicator.stream):
                slot.zero_()
            self._send(slot.data_ptr(), num_bytes)

    def _send(self, address: int, num_bytes: int) -> None:
        self._communicator.send(address, num_bytes)
        self._sending.append(torch.cuda.Event())
        self._sending[-1].record(self._communicator.stream)

    def _check_taken(self) -> None:
        """Raises ExchangeError when the other side asked for more than it has slots for."""
        while self._sending and self._sending[0].query():
            self._sending.popleft()
        if len(self._sending) > 2 * NUM_SLOTS:  # the last ones may not be known to have arrived
            raise ExchangeError(f"{len(self._sending)} blocks were asked for and are not taken")

    def _take_slot(self) -> int:
        slot, self._next_slot = self._next_slot, (self._next_slot + 1) % NUM_SLOTS
        return slot


class NcclReceiver(_Channel):
    """Decode's side."""

    def __init__(self, unique_id: bytes, pages: CudaPages, heads: range, page_size: int):
        super().__init__(unique_id, DECODE, pages, heads, page_size)

    def post(self, slot: int, num_bytes: int) -> Ticket:
        """Queues the receiving of the next block into a slot; the ticket says when it is there."""
        event = torch.cuda.Event()
        with torch.cuda.device(self._device):
            self._communicator.receive(self._slots[slot].data_ptr(), num_bytes)
            event.record(self._communicator.stream)
        return event.query

    def write(self, slot: int, part: range, block: Block, ids: PageIds) -> None:
        """From a slot to pages `ids` of the pool; returns when they are there."""
        with torch.cuda.device(self._device):
            self._prepare(part, block, slot, ids, to_pool=True).run_on(self._own_stream)
        self._own_stream.synchronize()
