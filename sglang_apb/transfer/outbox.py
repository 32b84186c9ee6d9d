"""Prefill side: one request's transfer, and what of it waits to be sent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from sglang_apb.transfer import wire
from sglang_apb.transfer.exchange import Held
from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.wire import Ask, Block, Buffer

# None: there are more, and not now.
Frames: TypeAlias = Iterator[list[Buffer] | None]
# Whether the bytes behind frames can be read: a GPU may still be writing them. Never blocks.
IsFinal: TypeAlias = Callable[[], bool]


class SendState(Enum):
    UNASKED = "the decode server has not asked yet"
    ASKED = "the decode server's pages are ready"
    DONE = "the decode server has everything"
    FAILED = "failed"


def always() -> bool:
    """For bytes that are final when they are queued."""
    return True


@dataclass(eq=False)
class Parcel:
    """Frames that become readable together. They are made only then, one at a time."""

    frames: Frames
    is_final: IsFinal = always


@dataclass(eq=False)
class SendRoom:
    """One request's transfer to one decode rank, the `asker`. State changes happen in the loop's thread; any thread may
    read them.

    `closed` is set by the owner before the request's pages are freed: a block that is still being gathered then is not
    sent any more, or END does not follow.
    """

    room: int
    asker: int = 0
    state: SendState = SendState.UNASKED
    reason: str = ""
    cause: Cause = Cause.GIVEN_UP
    ask: Ask | None = None
    attempt: int = 0
    identity: bytes = b""
    closed: bool = False
    num_bytes: int = 0
    num_hidden_bytes: int = 0
    is_offered: bool = False  # of its pages, some are read where they lie
    held: dict[Block, Held] = field(default_factory=dict)  # until they are fetched
    in_use: deque[Held] = field(default_factory=deque)  # their pages may still be read
    started: float = 0.0
    finished: float = 0.0
    outbox: deque[Parcel] = field(default_factory=deque)
    unsent: list[Buffer] | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.room, self.asker

    @property
    def seconds(self) -> float:
        """From the first byte queued to the decode server's "done"."""
        return max(0.0, self.finished - self.started)

    @property
    def is_sending(self) -> bool:
        return not self.closed and self.state is SendState.ASKED

    def pack(self, message: wire.Message) -> list[Buffer]:
        """A message about this transfer, as a frame."""
        return wire.pack_message(message, self.room, self.attempt, self.asker)

    def start(self) -> None:
        self.started = time.monotonic()

    def end_prefill(self) -> None:
        """What is sent from now on was not hidden behind the prefill."""
        self.num_hidden_bytes = self.num_bytes

    def next_frame(self) -> list[Buffer] | None:
        """None when nothing is left, or nothing that is final. Raises what reading the pages raises."""
        while self.outbox and self.outbox[0].is_final():
            for frame in self.outbox[0].frames:
                return frame
            self.outbox.popleft()
        return None

    def needs_no_pages(self) -> bool:
        """Whether all that was held has been fetched, and nothing reads the request's pages any more."""
        while self.in_use and self.in_use[0].needs_no_pages:
            self.in_use.popleft()
        return not (self.held or self.in_use)

    def clear(self) -> None:
        self.outbox.clear()
        self.unsent = None
        self.in_use.clear()
        while self.held:
            _, held = self.held.popitem()
            held.drop()

    @property
    def has_more(self) -> bool:
        return self.unsent is not None or bool(self.outbox)
