"""Blocks that are fetched: over a channel for which both sides must be ready at once (nccl.py).

    decode    JOIN: its GPU, slot bytes  -->
              <--  JOIN: where to meet, or why not     prefill
              both make their end of the channel
    decode    JOIN: it has its end       -->           from here on blocks are not sent but said to be READY
              <--  READY: a block                      which is copied into a slot meanwhile
    decode has a slot free, waits for the block there
              FETCH: the block           -->           the block goes over the channel
    decode copies it into its pool
              <--  END, when every block has been fetched, and no page is read any more

A send that nobody waits for would hold multiprocessors of the prefill rank's GPU, and one peer that hangs all others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sglang_apb.transfer import wire
from sglang_apb.transfer.inbox import ReceiveRoom
from sglang_apb.transfer.wire import Block, Buffer, Join, Kind, PageIds

logger = logging.getLogger(__name__)

# Of each side. While one block is sent, one is copied on either side, and one asked for.
NUM_SLOTS = 4
# What a setting may ask for is not less.
MIN_SLOT_BYTES = 4 << 20
# Each has a thread until the other side has come, or has not for too long.
MAX_MAKING = 16
# A link may be slow; one over which nothing comes any more, although both sides are there, is broken.
ARRIVAL_S = 20.0


class ExchangeError(RuntimeError):
    """A channel does not work, or not any more."""


class Held(Protocol):
    """A block that a prefill rank holds until it is fetched: `send` or `drop` ends that."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def needs_no_pages(self) -> bool:
        """Whether nothing reads them any more."""
        ...

    def send(self) -> None: ...

    def drop(self) -> None: ...


class SendingChannel(Protocol):
    """Never blocks; what fails is told to the `on_error` that it was made with. For one thread."""

    slot_bytes: int

    @property
    def is_full(self) -> bool:
        """Whether blocks have to be fetched before another one can be held."""
        ...

    def hold(self, part: range, block: Block, ids: PageIds) -> Held:
        """The heads `part` of a block, pages `ids` of the pool, which must not change."""
        ...

    def send_nothing(self, num_bytes: int) -> None:
        """In place of a block of a request that is gone."""
        ...

    def close(self) -> None: ...


class ReceivingChannel(Protocol):
    """Never blocks, but in `write`; what fails is told to the `on_error` that it was made with."""

    slot_bytes: int

    def receive(
        self, slot: int, num_bytes: int, when_queued: Callable[[], None], when_there: Callable[[], None]
    ) -> None:
        """Has the next block received into a slot. Once `when_queued` has been called, it may come; `when_there` may
        `write` it. Both are called in threads of the channel, each in the order of the blocks.
        """
        ...

    def write(self, slot: int, part: range, block: Block, ids: PageIds) -> None:
        """From a slot to pages `ids` of the pool; returns when they are there."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Meeting:
    """How one side makes its ends of channels. `gpu` is which GPU it has: one that both have is no way. `check_memory`
    raises RuntimeError when there is none for slots of so many bytes.

    Both make slots of the smaller `slot_bytes`. `sender` and `receiver` also take what is to be called, in any thread,
    when the channel does not work any more, with the reason.
    """

    gpu: str
    new_id: Callable[[], bytes]
    sender: Callable[[bytes, int, Callable[[str], None]], SendingChannel]
    receiver: Callable[[bytes, int, Callable[[str], None]], ReceivingChannel]
    slot_bytes: int
    check_memory: Callable[[int], object]


@dataclass
class _End:
    channel: SendingChannel | None = None
    is_met: bool = False  # the other side has its end


class PrefillEnds:
    """A prefill rank's channels. Ends are made in threads of their own; everything else is the endpoint's thread's."""

    def __init__(
        self,
        meeting: Meeting,
        call: Callable[[Callable[[], None]], None],
        reply: Callable[[bytes, Join], None],
        on_broken: Callable[[bytes, str], None],
    ):
        self._meeting, self._call, self._reply, self._on_broken = meeting, call, reply, on_broken
        self._ends: dict[bytes, _End] = {}
        self._num_making = 0

    def join(self, identity: bytes, join: Join) -> None:
        if identity in self._ends:
            self._ends[identity].is_met |= bool(join.unique_id)
        elif join.unique_id:
            self._reply(identity, Join(reason="the prefill server has no such channel, or not any more"))
        elif join.gpu == self._meeting.gpu:
            self._reply(identity, Join(reason="both ranks are on one GPU"))
        elif self._num_making >= MAX_MAKING:
            self._reply(identity, Join(reason=f"{MAX_MAKING} channels are being made already"))
        elif (slot_bytes := min(join.slot_bytes, self._meeting.slot_bytes)) < MIN_SLOT_BYTES:
            self._reply(identity, Join(reason=f"slots of {slot_bytes} bytes are less than {MIN_SLOT_BYTES}"))
        else:
            self._ends[identity] = _End()
            self._num_making += 1
            make = partial(self._make, identity, slot_bytes)
            threading.Thread(target=make, name="kv-channel", daemon=True).start()

    def channel(self, identity: bytes) -> SendingChannel | None:
        """None while one of the ends is missing."""
        end = self._ends.get(identity)
        return end.channel if end is not None and end.is_met else None

    def lose(self, identity: bytes) -> None:
        end = self._ends.pop(identity, None)
        if end is not None and end.channel is not None:
            end.channel.close()

    def _make(self, identity: bytes, slot_bytes: int) -> None:
        try:
            self._meeting.check_memory(slot_bytes)
            unique_id = self._meeting.new_id()
            self._call(partial(self._reply, identity, Join(unique_id=unique_id, slot_bytes=slot_bytes)))
            channel = self._meeting.sender(unique_id, slot_bytes, partial(self._tell_broken, identity))
        except Exception as error:
            logger.warning("KV transfer: no channel to a decode rank: %s", error)
            self._call(partial(self._give_up, identity, str(error)))
        else:
            self._call(partial(self._add, identity, channel))

    def _tell_broken(self, identity: bytes, reason: str) -> None:
        self._call(partial(self._on_broken, identity, reason))

    def _give_up(self, identity: bytes, reason: str) -> None:
        self._num_making -= 1
        if identity in self._ends:
            self._reply(identity, Join(reason=reason[:2000]))
        self.lose(identity)

    def _add(self, identity: bytes, channel: SendingChannel) -> None:
        self._num_making -= 1
        if identity in self._ends:
            self._ends[identity].channel = channel
        else:  # lost meanwhile
            channel.close()


@dataclass(frozen=True, eq=False)
class Fetch:
    """A block that is on its way to a decode rank, or going to be."""

    room: ReceiveRoom
    rank: int
    block: Block
    num_bytes: int


class Fetcher:
    """A decode rank's end of one channel. Everything is the endpoint's thread's, where `call` runs a command, but
    `place`: it is called in a thread of the channel, and takes a block out of its slot.
    """

    def __init__(
        self,
        channel: ReceivingChannel,
        send: Callable[[list[Buffer]], None],
        call: Callable[[Callable[[], None]], None],
        place: Callable[[ReceivingChannel, int, Fetch], None],
    ):
        self.channel = channel
        self._send, self._call, self._place = send, call, place
        self._is_closed = False
        self._waiting: deque[Fetch] = deque()
        self._asked: deque[float] = deque()  # when, of each block that is coming
        self._free = deque(range(NUM_SLOTS))

    @property
    def is_busy(self) -> bool:
        return bool(self._asked)  # none waits while there is a slot

    def add(self, fetch: Fetch) -> None:
        self._waiting.append(fetch)
        self._ask()

    def close(self) -> None:
        self._is_closed = True
        self.channel.close()

    def check(self) -> None:
        """Raises ExchangeError when a block has not come for too long."""
        if self._asked and time.monotonic() - self._asked[0] > ARRIVAL_S:
            raise ExchangeError(f"a block has not come for {ARRIVAL_S:g} s")

    def _ask(self) -> None:
        while self._free and self._waiting:
            fetch, slot = self._waiting.popleft(), self._free.popleft()
            room, body = fetch.room, wire.pack_fetch(fetch.block, fetch.num_bytes)
            frame = wire.pack(Kind.FETCH, room.room, room.attempt, body, asker=room.asker)
            self._asked.append(time.monotonic())
            when_queued = partial(self._call, partial(self._fetch, frame))
            self.channel.receive(slot, fetch.num_bytes, when_queued, partial(self._take, slot, fetch))

    def _fetch(self, frame: list[Buffer]) -> None:
        if not self._is_closed:
            self._send(frame)

    def _take(self, slot: int, fetch: Fetch) -> None:
        self._place(self.channel, slot, fetch)
        self._call(partial(self._empty, slot))

    def _empty(self, slot: int) -> None:
        self._asked.popleft()
        self._free.append(slot)
        if not self._is_closed:
            self._ask()
