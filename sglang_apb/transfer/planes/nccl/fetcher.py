"""Blocks that a prefill rank has ready, and the channel over which they are fetched, one slot for each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.planes.base import ReceiveSide
from sglang_apb.transfer.planes.nccl.channels import NUM_SLOTS, ChannelError, ReceivingChannel, pack_fetch
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, Buffer, Kind, PageIds

# A link may be slow; one over which nothing comes any more, although both sides are there, is broken.
ARRIVAL_S = 20.0


@dataclass(eq=False)
class Fetch:
    """A block that is on its way to a decode rank, or going to be."""

    request: DecodeRequest
    rank: int
    block: Block
    num_bytes: int
    asked: float = 0.0

    @property
    def part(self) -> range:
        return self.request.parts[self.rank]

    @property
    def ids(self) -> PageIds:
        """Where its pages are in the pool."""
        return self.request.ids_of(self.block)

    @property
    def frame(self) -> list[Buffer]:
        request = self.request
        body = pack_fetch(self.block, self.num_bytes)
        return wire.pack(Kind.FETCH, request.room, request.attempt, body, asker=request.asker)


class Fetcher:
    """A decode rank's end of one channel. Everything is the endpoint's thread's."""

    def __init__(self, channel: ReceivingChannel, side: ReceiveSide):
        self.channel = channel
        self._side = side
        self._is_closed = False
        self._waiting: deque[Fetch] = deque()
        self._coming: deque[Fetch] = deque()
        self._free = deque(range(NUM_SLOTS))
        self._last_arrival = 0.0

    @property
    def idle_seconds(self) -> float:
        """How long it has waited for the block that is to come next."""
        since = max(self._last_arrival, self._coming[0].asked) if self._coming else time.monotonic()
        return time.monotonic() - since

    @property
    def requests(self) -> set[DecodeRequest]:
        """Those with blocks that are coming, or going to."""
        return {fetch.request for fetch in (*self._coming, *self._waiting)}

    @property
    def is_busy(self) -> bool:
        return bool(self._coming)  # none waits while there is a slot

    def add(self, fetch: Fetch) -> None:
        self._waiting.append(fetch)
        self._ask()

    def close(self) -> None:
        self._is_closed = True
        self.channel.close()

    def check(self) -> None:
        """Raises ChannelError when a block has not come for too long."""
        if self.idle_seconds > ARRIVAL_S:
            raise ChannelError(f"a block has not come for {ARRIVAL_S:g} s")

    def _ask(self) -> None:
        while self._free and self._waiting:
            self._receive(self._waiting.popleft(), self._free.popleft())

    def _receive(self, fetch: Fetch, slot: int) -> None:
        what = fetch.part, fetch.block, fetch.ids
        fetch.asked = time.monotonic()
        self._coming.append(fetch)
        when_queued = partial(self._side.call, partial(self._send, fetch.frame))
        address = self.channel.address_of(*what)
        if address is not None and fetch.request.begin_arrival():
            when_over = partial(self._end_arrival, fetch, slot)
        else:
            address, when_over = None, partial(self._take, fetch, slot, partial(self.channel.write, slot, *what))
        self.channel.receive(slot, fetch.num_bytes, address, when_queued, when_over)

    def _send(self, frame: list[Buffer]) -> None:
        if not self._is_closed:
            self._side.send(frame)

    def _end_arrival(self, fetch: Fetch, slot: int, has_come: bool) -> None:
        """In a thread of the channel."""
        fetch.request.end_arrival()
        self._take(fetch, slot, None, has_come)

    def _take(self, fetch: Fetch, slot: int, write: Callable[[], None] | None, has_come: bool) -> None:
        """In a thread of the channel."""
        if has_come:
            self._side.place(fetch.request, fetch.rank, fetch.block, fetch.num_bytes, write)
        self._side.call(partial(self._empty, slot))

    def _empty(self, slot: int) -> None:
        self._last_arrival = time.monotonic()
        self._coming.popleft()
        self._free.append(slot)
        if not self._is_closed:
            self._ask()
