"""Prefill side: one request's transfers to all decode ranks that ask this rank, as if they were one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.outbox import IsFinal, SendRoom, SendState, always
from sglang_apb.transfer.ownership import PageRange
from sglang_apb.transfer.pages import PageIdsLater
from sglang_apb.transfer.room_number import why_no_room
from sglang_apb.transfer.sending import SendingEndpoint
from sglang_apb.transfer.wire import Ask

# What one of the transfers has come to is what all have come to: the first of these that any is in.
_WORST_FIRST = (SendState.FAILED, SendState.UNASKED, SendState.ASKED, SendState.DONE)


class FanOut:
    """With decode tensor parallel as prefill is, there is one transfer; else the first that asks says how many.

    Closed when it is forgotten: SGLang drops a request without a word when its client goes while it waits.
    """

    def __init__(self, endpoint: SendingEndpoint, room: int) -> None:
        self._endpoint = endpoint
        self._room = room
        self.rooms = [self._open(0)]

    def _open(self, asker: int) -> SendRoom:
        try:
            if why := why_no_room(self._room):
                raise ValueError(why)
            room = self._endpoint.open(self._room, asker)
        except ValueError as error:
            self._endpoint.observer.failed(self._room, Cause.ERROR, str(error))
            return SendRoom(self._room, asker, SendState.FAILED, str(error), Cause.ERROR, closed=True)
        weakref.finalize(self, self._endpoint.close, room).atexit = False
        return room

    def wait_for_others(self) -> None:
        """Opens the transfers of the other decode ranks, once one has said how many ask."""
        ask = self.rooms[0].ask
        if ask is not None and not self.rooms[0].closed:
            self.rooms += [self._open(asker) for asker in range(len(self.rooms), ask.num_askers)]

    @property
    def state(self) -> SendState:
        return min((room.state for room in self.rooms), key=_WORST_FIRST.index)

    @property
    def failure(self) -> Failure | None:
        return next((Failure(room.reason, room.cause) for room in self.rooms if room.reason), None)

    @property
    def is_sending(self) -> bool:
        return all(room.is_sending for room in self.rooms)

    @property
    def has_contact(self) -> bool:
        """Whether a decode rank has spoken of the request."""
        return any(room.identity for room in self.rooms)

    @property
    def asks(self) -> list[Ask]:
        return [room.ask for room in self.rooms if room.ask is not None]

    @property
    def num_bytes(self) -> int:
        return sum(room.num_bytes for room in self.rooms)

    @property
    def seconds(self) -> float:
        return max(room.seconds for room in self.rooms)

    def announce(self, ranges: Sequence[PageRange]) -> None:
        for room in self.rooms:
            self._endpoint.announce(room, ranges)

    def end_prefill(self) -> None:
        for room in self.rooms:
            room.end_prefill()

    def send_pages(
        self, pages: PageRange, ids: PageIdsLater, layers: Sequence[int], is_final: IsFinal = always
    ) -> None:
        for room in self.rooms:
            self._endpoint.send_pages(room, pages, ids, layers, is_final)

    def finish(self, aux_index: int | None, info: Mapping[str, int | str]) -> None:
        for room in self.rooms:
            self._endpoint.finish(room, aux_index, info)

    def close(self, reason: str, cause: Cause = Cause.GIVEN_UP) -> None:
        """Tells every decode rank that still waits `reason`."""
        for room in self.rooms:
            self._endpoint.close(room, reason, cause)
