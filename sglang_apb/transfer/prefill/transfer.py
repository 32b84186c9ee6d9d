"""One request's KV on its way to one decode rank, and what of it waits to be sent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Ask, Buffer

# None: there are more, and not now.
Frames: TypeAlias = Iterator[list[Buffer] | None]
# Whether the bytes behind frames can be read: a GPU may still be writing them. Never blocks.
IsFinal: TypeAlias = Callable[[], bool]


class TransferState(Enum):
    UNASKED = "the decode server has not asked yet"
    ASKED = "the decode server's pages are ready"
    DONE = "the decode server has everything"
    FAILED = "failed"


def always() -> bool:
    """For bytes that are final when they are queued."""
    return True


@dataclass(eq=False)
class _Queued:
    """Frames that become readable together. They are made only then, one at a time."""

    frames: Frames
    is_final: IsFinal


@dataclass(eq=False)
class Transfer:
    """To the decode rank that is number `asker` of those that ask, connected as `peer`. State changes happen in the
    endpoint's thread; any thread may read them.

    `closed` is set by the owner before the request's pages are freed: a block that is still being gathered then is not
    sent any more, or END does not follow.
    """

    room: int
    asker: int = 0
    state: TransferState = TransferState.UNASKED
    reason: str = ""
    cause: Cause = Cause.GIVEN_UP
    ask: Ask | None = None
    attempt: int = 0
    peer: bytes = b""
    closed: bool = False
    num_bytes: int = 0
    num_hidden_bytes: int = 0
    started: float = 0.0
    finished: float = 0.0
    _queue: deque[_Queued] = field(default_factory=deque)
    _unsent: list[Buffer] | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.room, self.asker

    @property
    def seconds(self) -> float:
        """From the first byte queued to the decode server's "done"."""
        return max(0.0, self.finished - self.started)

    @property
    def is_sending(self) -> bool:
        return not self.closed and self.state is TransferState.ASKED

    @property
    def is_open(self) -> bool:
        """Whether its end has still to be told."""
        return self.state in (TransferState.UNASKED, TransferState.ASKED)

    def pack(self, kind: int, body: bytes = b"", payload: Buffer | None = None) -> list[Buffer]:
        """A frame about this transfer."""
        return wire.pack(kind, self.room, self.attempt, body, payload, self.asker)

    def pack_message(self, message: wire.Message) -> list[Buffer]:
        return wire.pack_message(message, self.room, self.attempt, self.asker)

    def start(self) -> None:
        self.started = time.monotonic()

    def end_prefill(self) -> None:
        """What is sent from now on was not hidden behind the prefill."""
        self.num_hidden_bytes = self.num_bytes

    def queue(self, frames: Frames, is_final: IsFinal) -> None:
        self._queue.append(_Queued(frames, is_final))

    def next_frame(self) -> list[Buffer] | None:
        """None when nothing is left, or nothing that is final. Raises what reading the pages raises."""
        if (unsent := self._unsent) is not None:
            self._unsent = None
            return unsent
        while self._queue and self._queue[0].is_final():
            for frame in self._queue[0].frames:
                return frame
            self._queue.popleft()
        return None

    def put_back(self, frame: list[Buffer]) -> None:
        """What ZMQ did not take yet."""
        self._unsent = frame

    def clear(self) -> None:
        self._queue.clear()
        self._unsent = None

    @property
    def has_more(self) -> bool:
        return self._unsent is not None or bool(self._queue)
