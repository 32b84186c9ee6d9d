"""A block of pages from GPU to GPU by NCCL: over InfiniBand, RoCE, NVLink or TCP, whatever NCCL finds.

Communicators do not block: one whose other side is gone is given up without it (`ncclCommAbort`). Each is used in one
thread of its own, since a call takes 0.15 ms, and seconds where the other side hangs. NCCL does not encrypt, and
authenticates nobody.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_apb.transfer import wire
from sglang_apb.transfer.config import OPTION
from sglang_apb.transfer.exchange import NUM_SLOTS, ExchangeError
from sglang_apb.transfer.gpu_pages import CudaPages, GpuSide, UploadedIds
from sglang_apb.transfer.wire import Block, PageIds
from sglang_apb.transfer.worker import Worker

if TYPE_CHECKING:
    from sglang_apb.kernels.page_copy import PageCopy

logger = logging.getLogger(__name__)

PREFILL, DECODE = 0, 1
_IN_PROGRESS = 7  # ncclInProgress (nccl.h)
_UINT8 = 1
_CONNECT_S = 20.0
_PAUSE_S = 0.001
_CALL_S = 2.0
# NCCL's kernel takes that many multiprocessors of a GPU that computes beside it. NVLink needs them (H200: 8 reach 257
# of 359 GB/s, 16 reach 354); over a network NCCL takes fewer by itself.
_MAX_CTAS = 16
# PyTorch has 32 streams of each priority, and hands them out again: those of SGLang, which have 0, wait for no peer so.
# Sending goes before copying, since the other side's multiprocessors stand by, and both before prefill, which fills the
# GPU.
_UPLOADS, _SENDING, _COPIES = -3, -2, -1
# Of GPU memory, for what the server computes, beside NCCL's own.
_SPARE_BYTES = 1 << 30


def new_id() -> bytes:
    """Opens a port to which both sides of a communicator connect; the id says where."""
    return bytes(_library().ncclGetUniqueId())


class Communicator:
    """Of two processes. Making it returns when the other side has made its own; raises ExchangeError."""

    def __init__(self, unique_id: bytes, rank: int, device: torch.device):
        from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

        self._lib, self._peer = _library().lib, 1 - rank
        self._is_hurried = False
        self.stream = torch.cuda.Stream(device, priority=_SENDING)
        self._comm = ctypes.c_void_p()
        config = wrapper.ncclConfig_t.create()
        config.blocking, config.maxCTAs = 0, _MAX_CTAS
        identity = wrapper.ncclUniqueId.from_buffer_copy(unique_id)
        with torch.cuda.device(device):
            code = self._lib.ncclCommInitRankConfig(ctypes.byref(self._comm), 2, identity, rank, ctypes.byref(config))
            try:
                self._wait(code, _CONNECT_S, pause=_PAUSE_S)
                self._connect(device)
            except ExchangeError:
                self.abort()
                raise

    def send(self, address: int, num_bytes: int) -> None:
        """Queues it on `stream`."""
        self._call(self._lib.ncclSend, address, num_bytes, _CALL_S)

    def receive(self, address: int, num_bytes: int) -> None:
        self._call(self._lib.ncclRecv, address, num_bytes, _CALL_S)

    @property
    def is_closed(self) -> bool:
        """Also while it ends what is on its way."""
        return not self._comm

    def hurry(self) -> None:
        """Lets a call that waits in another thread end with an error."""
        self._is_hurried = True

    def abort(self) -> None:
        """Ends what is on its way; returns when the GPU has nothing to do with it any more."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._lib.ncclCommAbort(comm)

    def _connect(self, device: torch.device) -> None:
        """The first send connects both sides, for which each has to wait for the other."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        function = self._lib.ncclRecv if self._peer == PREFILL else self._lib.ncclSend
        self._call(function, byte.data_ptr(), 1, _CONNECT_S, _PAUSE_S)
        deadline = time.monotonic() + _CONNECT_S
        while not self.stream.query():
            if time.monotonic() > deadline:
                raise ExchangeError(f"the other side has not come within {_CONNECT_S:g} s")
            time.sleep(_PAUSE_S)

    def _call(self, function: Any, address: int, num_bytes: int, seconds: float, pause: float = 0.0) -> None:
        if not self._comm:
            raise ExchangeError("the communicator is closed")
        code = function(address, num_bytes, _UINT8, self._peer, self._comm, self.stream.cuda_stream)
        self._wait(code, seconds, pause)

    def _wait(self, code: int, seconds: float, pause: float) -> None:
        deadline = time.monotonic() + seconds
        state = ctypes.c_int(code)
        while state.value == _IN_PROGRESS:
            if self._is_hurried:
                raise ExchangeError("the channel is closed")
            if time.monotonic() > deadline:
                raise ExchangeError(f"NCCL has not finished a call within {seconds:g} s")
            time.sleep(pause)
            self._lib.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        if state.value:
            raise ExchangeError(f"NCCL: {_library().ncclGetErrorString(state.value)}")


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


class _Channel:
    """One side of a pair: its pool, and slots of memory through which blocks go.

    Copies have a stream of their own: the next block is copied while one is sent. What they need is uploaded on another
    one, which waits for no other side. What fails, in either of its threads, is told to `on_error`, once.
    """

    _rank: int

    def __init__(
        self,
        unique_id: bytes,
        slot_bytes: int,
        on_error: Callable[[str], None],
        *,
        pages: CudaPages,
        heads: range,
        page_size: int,
    ):
        self.slot_bytes = slot_bytes
        self._device = pages.buffers[0].device
        self._side = GpuSide.of(pages, heads, page_size)
        self._on_error = on_error
        self._is_closed = self._has_failed = False
        self._uploads = torch.cuda.Stream(self._device, priority=_UPLOADS)
        self._copies = torch.cuda.Stream(self._device, priority=_COPIES)
        self._pool_ids = UploadedIds(self._device, reader=self._copies)
        self._tables: dict[tuple[int, range], PageCopy] = {}
        self._communicator = Communicator(unique_id, self._rank, self._device)
        try:
            # Nothing of what was there may be sent (`send_nothing`).
            self._slots = find_memory(slot_bytes, self._device).zero_()
        except RuntimeError:
            self._communicator.abort()
            raise
        torch.cuda.current_stream(self._device).synchronize()
        self._worker = Worker("kv-nccl")

    def close(self) -> None:
        """The slots stay until nothing can be written there any more."""
        self._is_closed = True
        self._communicator.hurry()
        self._worker.submit(self._abort)
        self._worker.end()

    def _abort(self) -> None:
        self._communicator.abort()
        self._copies.synchronize()  # one may be queued behind a block that was not taken

    def _submit(self, worker: Worker, function: Callable[[], None]) -> None:
        worker.submit(partial(self._try, function))

    def _try(self, function: Callable[[], None]) -> None:
        if self._has_failed or self._is_closed:
            return
        try:
            with torch.cuda.device(self._device):
                function()
        except Exception as error:  # whatever it was: the other side waits for that block, and not for the next one
            if not (self._has_failed or self._is_closed):
                self._has_failed = True
                self._on_error(str(error))

    def _copy(self, slot: int, part: range, block: Block, ids: PageIds, *, to_pool: bool) -> None:
        """Queues the copying of a block between a slot and pages `ids` of the pool."""
        from sglang_apb.kernels.page_copy import copy_pages_triton

        with torch.cuda.stream(self._uploads):
            if (table := self._tables.get((slot, part))) is None:
                address = self._slots[slot].data_ptr()
                table = self._tables[slot, part] = self._side.copy_of(part, address, self._device, to_pool=to_pool)
            there = self._pool_ids.of(ids), self._pool_ids.in_order(len(ids))
        if not self._uploads.query():
            self._uploads.synchronize()
        with torch.cuda.stream(self._copies):
            copy_pages_triton(table, block.first_buffer, block.num_buffers, *(reversed(there) if to_pool else there))


_allocating = threading.Lock()


def find_memory(slot_bytes: int, device: torch.device) -> torch.Tensor:
    """Slots. Raises ExchangeError when too little would be left beside them, RuntimeError when there is not as much."""
    with _allocating:  # several channels are made at once
        slots = torch.empty(NUM_SLOTS, slot_bytes, dtype=torch.uint8, device=device)
        left, _ = torch.cuda.mem_get_info(device)
    if left < _SPARE_BYTES:
        raise ExchangeError(
            f"beside the {slots.nbytes >> 20} MB of a channel {left >> 20} MB of GPU memory would be free, and "
            f"{_SPARE_BYTES >> 20} are to be: lower --mem-fraction-static or nccl_buffer_mb of {OPTION}"
        )
    return slots


class NcclSender(_Channel):
    """Prefill's side."""

    _rank = PREFILL

    def __init__(self, *arguments: Any, **side: Any):
        super().__init__(*arguments, **side)
        self._free = deque(range(NUM_SLOTS))
        self._sent: dict[int, torch.cuda.Event] = {}
        self._sending: deque[torch.cuda.Event] = deque()

    @property
    def is_full(self) -> bool:
        return not self._free

    def hold(self, part: range, block: Block, ids: PageIds) -> HeldBlock:
        slot = self._free.popleft()
        num_bytes = wire.block_bytes(block, self._side.page_lens(part))
        if (address := self._side.straight(part, block, ids)) is not None:
            return HeldBlock(self, slot, num_bytes, address, is_in_slot=False)
        held = HeldBlock(self, slot, num_bytes, self._slots[slot].data_ptr())
        self._submit(self._worker, partial(self._gather, held, part, block, ids))
        return held

    def send_nothing(self, num_bytes: int) -> None:
        """Whatever a slot holds, which is zeros or for the same rank: it waits for so much."""
        self._submit(self._worker, partial(self._send, HeldBlock(self, 0, num_bytes, self._slots[0].data_ptr())))

    def send(self, held: HeldBlock) -> None:
        self._submit(self._worker, partial(self._send, held))
        self._free.append(held.slot)

    def drop(self, held: HeldBlock) -> None:
        self._free.append(held.slot)

    def _gather(self, held: HeldBlock, part: range, block: Block, ids: PageIds) -> None:
        if held.slot in self._sent:
            self._copies.wait_event(self._sent[held.slot])
        self._copy(held.slot, part, block, ids, to_pool=False)
        read = torch.cuda.Event()
        read.record(self._copies)
        held.read = read  # only now: one that was never recorded says that it is done

    def _send(self, held: HeldBlock) -> None:
        self._check_taken()
        stream = self._communicator.stream
        if held.read is not None:
            stream.wait_event(held.read)
        self._communicator.send(held.address, held.num_bytes)
        sent = torch.cuda.Event()
        sent.record(stream)
        self._sending.append(sent)
        if held.is_in_slot:
            self._sent[held.slot] = sent
        else:
            held.read = sent

    def _check_taken(self) -> None:
        """Raises ExchangeError when the other side asked for more than it has slots for."""
        while self._sending and self._sending[0].query():
            self._sending.popleft()
        if len(self._sending) > 2 * NUM_SLOTS:  # the last ones may not be known to have arrived
            raise ExchangeError(f"{len(self._sending)} blocks were asked for and are not taken")


@dataclass(eq=False)
class HeldBlock:
    """In its slot, or where it lies in the pool: then it is read until it has been sent."""

    channel: NcclSender
    slot: int
    num_bytes: int
    address: int
    is_in_slot: bool = True
    read: torch.cuda.Event | None = None

    @property
    def needs_no_pages(self) -> bool:
        return self.read is not None and self.read.query()

    def send(self) -> None:
        self.channel.send(self)

    def drop(self) -> None:
        self.channel.drop(self)


class NcclReceiver(_Channel):
    """Decode's side. A thread more waits for blocks that are coming."""

    _rank = DECODE

    def __init__(self, *arguments: Any, **side: Any):
        super().__init__(*arguments, **side)
        self._arrivals = Worker("kv-arrivals")

    def close(self) -> None:
        super().close()
        self._arrivals.end()

    def receive(
        self, slot: int, num_bytes: int, when_queued: Callable[[], None], when_there: Callable[[], None]
    ) -> None:
        self._submit(self._worker, partial(self._receive, slot, num_bytes, when_queued, when_there))

    def write(self, slot: int, part: range, block: Block, ids: PageIds) -> None:
        self._copy(slot, part, block, ids, to_pool=True)
        self._copies.synchronize()

    def _receive(
        self, slot: int, num_bytes: int, when_queued: Callable[[], None], when_there: Callable[[], None]
    ) -> None:
        self._communicator.receive(self._slots[slot].data_ptr(), num_bytes)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(self._communicator.stream)
        self._submit(self._arrivals, partial(self._wait_for, arrived, when_there))
        when_queued()

    def _wait_for(self, arrived: torch.cuda.Event, when_there: Callable[[], None]) -> None:
        arrived.synchronize()
        if self._communicator.is_closed:  # what has been aborted is over, too
            raise ExchangeError("the communicator is closed")
        when_there()
