"""Decode side: blocks that a prefill rank has ready, and a channel to fetch them over (exchange.py)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sglang_apb.transfer import wire
from sglang_apb.transfer.exchange import NUM_SLOTS, ExchangeError, ReceivingChannel
from sglang_apb.transfer.inbox import ReceiveRoom
from sglang_apb.transfer.wire import Block, Buffer, Kind, PageIds

# A link may be slow; one over which nothing comes any more, although both sides are there, is broken.
ARRIVAL_S = 20.0


@dataclass(eq=False)
class Fetch:
    """A block that is on its way to a decode rank, or going to be."""

    room: ReceiveRoom
    rank: int
    block: Block
    num_bytes: int
    asked: float = 0.0

    @property
    def part(self) -> range:
        return self.room.parts[self.rank]

    @property
    def ids(self) -> PageIds:
        """Where its pages are in the pool."""
        return self.room.pages[self.block.first_page : self.block.first_page + self.block.num_pages]


# Takes a block that has come, and what brings it from its slot to its pages: None if it is there.
Place = Callable[[Fetch, Callable[[], None] | None], None]


class Fetcher:
    """A decode rank's end of one channel. Everything is the endpoint's thread's, where `call` runs a command, but
    `place`, which is called in a thread of the channel.
    """

    def __init__(
        self,
        channel: ReceivingChannel,
        send: Callable[[list[Buffer]], None],
        call: Callable[[Callable[[], None]], None],
        place: Place,
    ):
        self.channel = channel
        self._send, self._call, self._place = send, call, place
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
    def rooms(self) -> set[ReceiveRoom]:
        """Those with blocks that are coming, or going to."""
        return {fetch.room for fetch in (*self._coming, *self._waiting)}

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
        """Raises ExchangeError when a block has not come for too long."""
        if self.idle_seconds > ARRIVAL_S:
            raise ExchangeError(f"a block has not come for {ARRIVAL_S:g} s")

    def _ask(self) -> None:
        while self._free and self._waiting:
            self._receive(self._waiting.popleft(), self._free.popleft())

    def _receive(self, fetch: Fetch, slot: int) -> None:
        room, what = fetch.room, (fetch.part, fetch.block, fetch.ids)
        body = wire.pack_fetch(fetch.block, fetch.num_bytes)
        frame = wire.pack(Kind.FETCH, room.room, room.attempt, body, asker=room.asker)
        fetch.asked = time.monotonic()
        self._coming.append(fetch)
        when_queued = partial(self._call, partial(self._send_fetch, frame))
        address = self.channel.address_of(*what)
        if address is not None and room.begin_arrival():
            when_over = partial(self._end_arrival, fetch, slot)
        else:
            address, when_over = None, partial(self._take, fetch, slot, partial(self.channel.write, slot, *what))
        self.channel.receive(slot, fetch.num_bytes, address, when_queued, when_over)

    def _send_fetch(self, frame: list[Buffer]) -> None:
        if not self._is_closed:
            self._send(frame)

    def _end_arrival(self, fetch: Fetch, slot: int, has_come: bool) -> None:
        fetch.room.end_arrival()
        self._take(fetch, slot, None, has_come)

    def _take(self, fetch: Fetch, slot: int, write: Callable[[], None] | None, has_come: bool) -> None:
        if has_come:
            self._place(fetch, write)
        self._call(partial(self._empty, slot))

    def _empty(self, slot: int) -> None:
        self._last_arrival = time.monotonic()
        self._coming.popleft()
        self._free.append(slot)
        if not self._is_closed:
            self._ask()
