"""Blocks that are fetched: over a channel for which both sides must be ready at once (nccl.py).

    decode    JOIN: its GPU, slot bytes  -->
              <--  JOIN: where to meet, or why not     prefill
              both make their end of the channel
    decode    JOIN: it has its end       -->           from here on blocks are not sent but said to be READY
              <--  READY: a block                      which is copied into a slot meanwhile,
    decode has a slot free, waits for the block there  where its pages are not in a row
              FETCH: the block           -->           the block goes over the channel
    decode copies it into its pool,
    where it has not come straight to its pages
              <--  END, when every block has been fetched, and no page is read any more

A send that nobody waits for would hold multiprocessors of the prefill rank's GPU, and one peer that hangs all others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sglang_apb.transfer.wire import Block, Join, PageIds

logger = logging.getLogger(__name__)

# Of each side. While one block is sent, one is copied on either side, and one asked for.
NUM_SLOTS = 4
# What a setting may ask for is not less.
MIN_SLOT_BYTES = 4 << 20
# Each has a thread until the other side has come, or has not for too long.
MAX_MAKING = 16


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

    def address_of(self, part: range, block: Block, ids: PageIds) -> int | None:
        """Where to `receive` the heads `part` of a block, for them to be in pages `ids` of the pool then; None if these
        are not one piece of memory.
        """
        ...

    def receive(
        self,
        slot: int,
        num_bytes: int,
        address: int | None,
        when_queued: Callable[[], None],
        when_over: Callable[[bool], None],
    ) -> None:
        """Has the next block received, at `address` or, if None, into a slot.

        Once `when_queued` has been called, it may come. `when_over` is always called, with whether it has come, when
        nothing is received there any more, and may `write` what is in the slot. Both are called in threads of the
        channel, each in the order of the blocks until it is closed.
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
    when the channel does not work any more, with the reason; `sender` then what is to be called, in the same way, when
    the pages of a block that has been sent are not read any more.
    """

    gpu: str
    new_id: Callable[[], bytes]
    sender: Callable[[bytes, int, Callable[[str], None], Callable[[], None]], SendingChannel]
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
            wake = partial(self._call, _nothing)
            channel = self._meeting.sender(unique_id, slot_bytes, partial(self._tell_broken, identity), wake)
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


def _nothing() -> None:
    pass
