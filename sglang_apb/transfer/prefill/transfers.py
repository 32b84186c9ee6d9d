"""The transfers of one prefill rank: those that are open, that decode ranks have spoken of already, and of the past."""

from __future__ import annotations

import threading

from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.prefill.notices import Key, Notice, Notices
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState
from sglang_apb.transfer.protocol.room_number import in_use
from sglang_apb.transfer.protocol.wire import Frame, Kind

_FROM_WAITING = (Kind.EXPECT, Kind.ASK)


class Transfers:
    """For any thread. What is kept of requests that are not open lasts for `notice_seconds`.

    One that its owner has closed is as good as gone; the loop's thread removes it.
    """

    def __init__(self, notice_seconds: float):
        self.notice_seconds = notice_seconds
        self._lock = threading.Lock()
        self._open: dict[Key, Transfer] = {}
        self._notices = Notices()
        self._given_up = Notices()

    def __len__(self) -> int:
        """How many are open."""
        return sum(not transfer.closed for transfer in list(self._open.values()))

    def open(self, room: int, asker: int) -> tuple[Transfer, Notice | None]:
        """With what was said of it before. Raises ValueError when it is open already.

        Of a request that is refused so, the decode rank is told why, if it asks when the first one has ended.
        """
        key = room, asker
        with self._lock:
            if self._find(key) is not None:
                self._given_up.keep(self._gone(key, in_use(room)))
                raise ValueError(in_use(room))
            opened = self._open[key] = Transfer(room, asker)
            self._given_up.pop(key, None)
            return opened, self._notices.pop(key, None)

    def remove(self, transfer: Transfer) -> None:
        """One that has been closed."""
        with self._lock:
            if self._open.get(transfer.key) is transfer:
                del self._open[transfer.key]

    def find(self, key: Key) -> Transfer | None:
        with self._lock:
            return self._find(key)

    def _find(self, key: Key) -> Transfer | None:
        transfer = self._open.get(key)
        return None if transfer is None or transfer.closed else transfer

    def find_asked(self, peer: bytes, frame: Frame) -> Transfer | None:
        """That of a frame, if this is who asked for it, and in this attempt."""
        found = self.find(frame.key)
        return found if found is not None and (found.peer, found.attempt) == (peer, frame.attempt) else None

    def of(self, peer: bytes) -> list[Transfer]:
        """Those of a decode rank."""
        with self._lock:
            return [found for found in self._open.values() if found.peer == peer and not found.closed]

    def lose(self, peer: bytes, reason: str) -> list[Transfer]:
        """Those of a decode rank that is gone. What it was going to ask for fails when it is opened."""
        with self._lock:
            for key, notice in self._notices.items():
                if notice.peer == peer:
                    gone = Frame(Kind.STOP, key[0], 0, asker=key[1])
                    self._notices[key] = Notice(b"", gone, None, reason, notice.expires, Cause.LOST)
        return self.of(peer)

    def settle(self, notice: Notice) -> tuple[Transfer | None, str]:
        """The transfer of which something is said, or, if it is not open, why it will not be, empty if it may be: then
        what was said is kept until it is. Of several decode servers that wait for one room, the first has it.
        """
        key = notice.frame.key
        with self._lock:
            found, given_up = self._find(key), self._given_up.get(key)
            if found is not None and found.state is TransferState.DONE:
                found = None  # it is of the next request with that number
            waiting = self._notices.waiting(key) if found is None else found.peer
            if notice.frame.kind in _FROM_WAITING and waiting not in (b"", notice.peer):
                return None, in_use(notice.frame.room)
            if found is None and given_up is None and self._notices.is_news(notice):
                self._notices.keep(notice)
        return found, notice.reason or (given_up.reason if given_up else "")

    def refuse(self, number: int, reason: str) -> list[Notice]:
        """Of a request that will not come: who waits for it. Who asks later is told why. One that is open stays so."""
        with self._lock:
            if any(room == number for room, _ in self._open):
                return []
            waiting = [notice for key, notice in self._waiting() if key[0] == number]
            for key in {(number, 0), *(notice.frame.key for notice in waiting)}:
                self._notices.pop(key, None)
                self._given_up.keep(self._gone(key, reason))
            return waiting

    def overdue(self, seconds: float, until: float) -> list[Notice]:
        """Who has waited for `seconds` for a request that had not come `until` then (of time.monotonic)."""
        spoken = until - seconds + self.notice_seconds  # what was said then expires then
        with self._lock:
            return [notice for _, notice in self._waiting() if notice.expires < spoken]

    def give_up(self, transfer: Transfer, reason: str) -> None:
        """Who asks for one that is gone, perhaps over a new connection, is told why."""
        with self._lock:
            if self._find(transfer.key) is None:
                self._given_up.keep(self._gone(transfer.key, reason))

    def _waiting(self) -> list[tuple[Key, Notice]]:
        """Of whom a decode rank waits for an answer."""
        return [(key, notice) for key, notice in self._notices.items() if self._notices.waiting(key)]

    def _gone(self, key: Key, reason: str) -> Notice:
        room, asker = key
        return Notice.of(b"", Frame(Kind.STOP, room, 0, asker=asker), self.notice_seconds, reason)
