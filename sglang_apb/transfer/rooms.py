"""Prefill side: the transfers of one rank, those that decode ranks have spoken of already, and those of the past."""

from __future__ import annotations

import threading

from sglang_apb.transfer.early import Early, EarlyTable, Key
from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.outbox import SendRoom, SendState
from sglang_apb.transfer.room_number import in_use
from sglang_apb.transfer.wire import Frame, Kind

_FROM_WAITING = (Kind.EXPECT, Kind.ASK)


class SendRooms:
    """For any thread. What is kept of requests that are not open lasts for `early_seconds`.

    A room that its owner has closed is as good as gone; the loop's thread removes it.
    """

    def __init__(self, early_seconds: float):
        self.early_seconds = early_seconds
        self._lock = threading.Lock()
        self._open: dict[Key, SendRoom] = {}
        self._early = EarlyTable()
        self._given_up = EarlyTable()

    def __len__(self) -> int:
        """How many are open."""
        return sum(not room.closed for room in list(self._open.values()))

    def open(self, room: int, asker: int) -> tuple[SendRoom, Early | None]:
        """With what was said of it before. Raises ValueError when it is open already.

        Of a request that is refused so, the decode rank is told why, if it asks when the first one has ended.
        """
        key = room, asker
        with self._lock:
            if self._find(key) is not None:
                self._given_up.keep(self._gone(key, in_use(room)))
                raise ValueError(in_use(room))
            opened = self._open[key] = SendRoom(room, asker)
            self._given_up.pop(key, None)
            return opened, self._early.pop(key, None)

    def remove(self, room: SendRoom) -> None:
        """One that has been closed."""
        with self._lock:
            if self._open.get(room.key) is room:
                del self._open[room.key]

    def find(self, key: Key) -> SendRoom | None:
        with self._lock:
            return self._find(key)

    def _find(self, key: Key) -> SendRoom | None:
        room = self._open.get(key)
        return None if room is None or room.closed else room

    def find_asked(self, identity: bytes, frame: Frame) -> SendRoom | None:
        """That of a frame, if this is who asked for it, and in this attempt."""
        room = self.find(frame.key)
        return room if room is not None and (room.identity, room.attempt) == (identity, frame.attempt) else None

    def of(self, identity: bytes) -> list[SendRoom]:
        """Those of a decode rank."""
        with self._lock:
            return [room for room in self._open.values() if room.identity == identity and not room.closed]

    def lose(self, identity: bytes, reason: str) -> list[SendRoom]:
        """Those of a decode rank that is gone. What it was going to ask for fails when it is opened."""
        with self._lock:
            for key, early in self._early.items():
                if early.identity == identity:
                    gone = Frame(Kind.STOP, key[0], 0, asker=key[1])
                    self._early[key] = Early(b"", gone, None, reason, early.expires, Cause.LOST)
        return self.of(identity)

    def settle(self, early: Early) -> tuple[SendRoom | None, str]:
        """The room that something is said of, or, if it is not open, why it will not be, empty if it may be: then what
        was said is kept until it is. Of several decode servers that wait for one room, the first has it.
        """
        key = early.frame.key
        with self._lock:
            room, given_up = self._find(key), self._given_up.get(key)
            if room is not None and room.state is SendState.DONE:
                room = None  # it is of the next request with that number
            waiting = self._early.waiting(key) if room is None else room.identity
            if early.frame.kind in _FROM_WAITING and waiting not in (b"", early.identity):
                return None, in_use(early.frame.room)
            if room is None and given_up is None and self._early.is_news(early):
                self._early.keep(early)
        return room, early.reason or (given_up.reason if given_up else "")

    def refuse(self, number: int, reason: str) -> list[Early]:
        """Of a request that will not come: who waits for it. Who asks later is told why. One that is open stays so."""
        with self._lock:
            if any(room == number for room, _ in self._open):
                return []
            waiting = [early for key, early in self._early.items() if key[0] == number and self._early.waiting(key)]
            for key in {(number, 0), *(early.frame.key for early in waiting)}:
                self._early.pop(key, None)
                self._given_up.keep(self._gone(key, reason))
            return waiting

    def overdue(self, seconds: float, until: float) -> list[Early]:
        """Who has waited for `seconds` for a request that had not come `until` then (of time.monotonic)."""
        spoken = until - seconds + self.early_seconds  # what was said then expires then
        with self._lock:
            return [early for key, early in self._early.items() if early.expires < spoken and self._early.waiting(key)]

    def give_up(self, room: SendRoom, reason: str) -> None:
        """Who asks for a room that is gone, perhaps over a new connection, is told why."""
        with self._lock:
            if self._find(room.key) is None:
                self._given_up.keep(self._gone(room.key, reason))

    def _gone(self, key: Key, reason: str) -> Early:
        room, asker = key
        return Early.of(b"", Frame(Kind.STOP, room, 0, asker=asker), self.early_seconds, reason)
