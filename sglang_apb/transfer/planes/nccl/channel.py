"""A block of pages from GPU to GPU by NCCL: over InfiniBand, RoCE, NVLink or TCP, whatever NCCL finds.

A block is one piece of memory: a slot, or the pool itself where one buffer's pages are in a row there, as they are of a
long prompt. Either side does as its own pages lie.

Each communicator is used in one thread of its own, since a call takes 0.15 ms, and seconds where the other side hangs.
Another one waits for what a GPU has sent or received.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_apb.transfer.memory.gpu_pages import CudaPages, GpuSide, UploadedIds
from sglang_apb.transfer.planes.nccl.channels import NUM_SLOTS, ChannelError
from sglang_apb.transfer.planes.nccl.communicator import DECODE, PREFILL, Communicator
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.config import OPTION
from sglang_apb.transfer.protocol.wire import Block, PageIds
from sglang_apb.transfer.worker import Worker

if TYPE_CHECKING:
    from sglang_apb.kernels.page_copy import PageCopy

logger = logging.getLogger(__name__)

# PyTorch has 32 streams of each priority, and hands them out again: those of SGLang, which have 0, wait for no peer so.
# Sending goes before copying, since the other side's multiprocessors stand by, and both before prefill, which fills the
# GPU.
_UPLOADS, _SENDING, _COPIES = -3, -2, -1
# Of GPU memory, for what the server computes, beside NCCL's own.
_SPARE_BYTES = 1 << 30


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
        self._communicator = Communicator(unique_id, self._rank, self._device, _SENDING)
        try:
            # Nothing of what was there may be sent (`send_nothing`).
            self._slots = find_memory(slot_bytes, self._device).zero_()
        except RuntimeError:
            self._communicator.abort()
            raise
        torch.cuda.current_stream(self._device).synchronize()
        self._calls, self._waits = Worker("kv-nccl"), Worker("kv-nccl-waits")

    def close(self) -> None:
        """The slots stay until nothing can be written there any more."""
        self._is_closed = True
        self._communicator.hurry()
        self._calls.submit(self._abort)
        self._calls.end()

    def _abort(self) -> None:
        try:
            self._communicator.abort()
            self._communicator.stream.synchronize()
            self._copies.synchronize()  # one may be queued behind a block that was not taken
        finally:
            self._waits.end()

    def _submit(self, function: Callable[[], None]) -> None:
        self._calls.submit(partial(self._try, function))

    def _try(self, function: Callable[[], None]) -> bool:
        """Whether it has done what it should."""
        if self._has_failed or self._is_closed:
            return False
        try:
            with torch.cuda.device(self._device):
                function()
        except Exception as error:  # whatever it was: the other side waits for that block, and not for the next one
            self._fail(error)
            return False
        return True

    def _fail(self, error: Exception) -> None:
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
    """Slots. Raises ChannelError when too little would be left beside them, RuntimeError when there is not as much."""
    with _allocating:  # several channels are made at once
        slots = torch.empty(NUM_SLOTS, slot_bytes, dtype=torch.uint8, device=device)
        left, _ = torch.cuda.mem_get_info(device)
    if left < _SPARE_BYTES:
        raise ChannelError(
            f"beside the {slots.nbytes >> 20} MB of a channel {left >> 20} MB of GPU memory would be free, and "
            f"{_SPARE_BYTES >> 20} are to be: lower --mem-fraction-static or nccl_buffer_mb of {OPTION}"
        )
    return slots


class NcclSender(_Channel):
    """Prefill's side."""

    _rank = PREFILL

    def __init__(
        self,
        unique_id: bytes,
        slot_bytes: int,
        on_error: Callable[[str], None],
        on_read: Callable[[], None],
        **side: Any,
    ):
        """`on_read` is called, in a thread of the channel, when a block has been sent from where it lay in the pool."""
        super().__init__(unique_id, slot_bytes, on_error, **side)
        self._on_read = on_read
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
        self._submit(partial(self._gather, held, part, block, ids))
        return held

    def send_nothing(self, num_bytes: int) -> None:
        """Whatever a slot holds, which is zeros or for the same rank: it waits for so much."""
        self._submit(partial(self._send, HeldBlock(self, 0, num_bytes, self._slots[0].data_ptr())))

    def send(self, held: HeldBlock) -> None:
        self._submit(partial(self._send, held))
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
        sent = torch.cuda.Event(blocking=True)
        sent.record(stream)
        self._sending.append(sent)
        if held.is_in_slot:
            self._sent[held.slot] = sent
        else:
            held.read = sent
            self._waits.submit(partial(self._try, partial(self._wait_for, sent)))

    def _wait_for(self, sent: torch.cuda.Event) -> None:
        sent.synchronize()
        self._on_read()

    def _check_taken(self) -> None:
        """Raises ChannelError when the other side asked for more than it has slots for."""
        while self._sending and self._sending[0].query():
            self._sending.popleft()
        if len(self._sending) > 2 * NUM_SLOTS:  # the last ones may not be known to have arrived
            raise ChannelError(f"{len(self._sending)} blocks were asked for and are not taken")


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
    """Decode's side."""

    _rank = DECODE

    def __init__(self, *arguments: Any, **side: Any):
        self._until_abort: list[Callable[[], None]] = []
        super().__init__(*arguments, **side)

    def address_of(self, part: range, block: Block, ids: PageIds) -> int | None:
        return self._side.straight(part, block, ids)

    def receive(
        self,
        slot: int,
        num_bytes: int,
        address: int | None,
        when_queued: Callable[[], None],
        when_over: Callable[[bool], None],
    ) -> None:
        target = self._slots[slot].data_ptr() if address is None else address
        self._calls.submit(partial(self._receive, target, num_bytes, when_queued, when_over))

    def write(self, slot: int, part: range, block: Block, ids: PageIds) -> None:
        with torch.cuda.device(self._device):
            self._copy(slot, part, block, ids, to_pool=True)
            self._copies.synchronize()

    def _receive(
        self, address: int, num_bytes: int, when_queued: Callable[[], None], when_over: Callable[[bool], None]
    ) -> None:
        arrived = torch.cuda.Event(blocking=True)
        if self._try(partial(self._queue, address, num_bytes, arrived)):
            self._waits.submit(partial(self._wait_for, arrived, when_over))
            when_queued()
        else:  # NCCL may still begin a receive that it has not ended in time
            self._until_abort.append(partial(when_over, False))

    def _queue(self, address: int, num_bytes: int, arrived: torch.cuda.Event) -> None:
        self._communicator.receive(address, num_bytes)
        arrived.record(self._communicator.stream)

    def _wait_for(self, arrived: torch.cuda.Event, when_over: Callable[[bool], None]) -> None:
        try:
            arrived.synchronize()
        except RuntimeError as error:
            self._fail(error)
        when_over(not (self._communicator.is_closed or self._has_failed))  # what has been aborted is over, too

    def _abort(self) -> None:
        try:
            super()._abort()
        finally:  # an error of CUDA's is for SGLang to meet: nobody may wait for it here
            for tell in self._until_abort:
                tell()
