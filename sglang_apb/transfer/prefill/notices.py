"""What decode ranks have said of requests that are not here yet, and what they are told of past ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeAlias

from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.protocol.wire import Ask, Frame, Kind

MAX_REASON_CHARS = 2000
_MAX_ENTRIES = 1 << 13

Key: TypeAlias = tuple[int, int]  # room, asker


@dataclass(frozen=True)
class Notice:
    """What a decode rank said of a room. A non-empty `reason` means failure. Of the frame, its body is not kept.

    `cause` says why, where the frame is a STOP; an ASK that has failed is of a server that does not fit.
    """

    peer: bytes
    frame: Frame
    ask: Ask | None
    reason: str
    expires: float
    cause: Cause = Cause.PEER

    @classmethod
    def of(cls, peer: bytes, frame: Frame, seconds: float, reason: str = "", ask: Ask | None = None) -> Notice:
        """To be remembered for `seconds`."""
        kept = Frame(frame.kind, frame.room, frame.attempt, asker=frame.asker)
        return cls(peer, kept, ask, reason[:MAX_REASON_CHARS], time.monotonic() + seconds)


class Notices(dict[Key, Notice]):
    """In order of time: expired and surplus entries go when another comes."""

    def keep(self, notice: Notice) -> None:
        key, now = notice.frame.key, time.monotonic()
        while self:
            oldest = next(iter(self))
            if self[oldest].expires > now and len(self) < _MAX_ENTRIES:
                break
            del self[oldest]
        self.pop(key, None)
        self[key] = notice

    def waiting(self, key: Key) -> bytes:
        """The decode rank that has said it will ask, or has asked; empty when there is none any more."""
        notice = self.get(key)
        if notice is None or notice.reason or notice.frame.kind is Kind.STOP or notice.expires < time.monotonic():
            return b""
        return notice.peer

    def is_news(self, notice: Notice) -> bool:
        """A STOP follows its ASK on one connection: without that ASK here, it is about a request of the past."""
        frame, before = notice.frame, self.get(notice.frame.key)
        if frame.kind is Kind.EXPECT:
            return before is None
        return frame.kind is Kind.ASK or frame.attempt == 0 or _same_ask(before, notice)


def _same_ask(before: Notice | None, notice: Notice) -> bool:
    return before is not None and (before.peer, before.frame.attempt) == (notice.peer, notice.frame.attempt)
