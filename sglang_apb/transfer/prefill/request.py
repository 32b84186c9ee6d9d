"""One request on a prefill rank: its transfers to all decode ranks that ask this rank, as if they were one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from sglang_apb.transfer.memory.pages import PageIdsLater
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import IsFinal, Transfer, TransferState, always
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.room_number import why_no_room
from sglang_apb.transfer.protocol.wire import Ask

# What one of the transfers has come to is what all have come to: the first of these that any is in.
_WORST_FIRST = (TransferState.FAILED, TransferState.UNASKED, TransferState.ASKED, TransferState.DONE)


class PrefillRequest:
    """With decode tensor parallel as prefill is, there is one transfer; else the first that asks says how many.

    Closed when it is forgotten: SGLang drops a request without a word when its client goes while it waits.
    """

    def __init__(self, endpoint: PrefillEndpoint, room: int) -> None:
        self._endpoint = endpoint
        self._room = room
        self.transfers = [self._open(0)]

    def _open(self, asker: int) -> Transfer:
        try:
            if why := why_no_room(self._room):
                raise ValueError(why)
            transfer = self._endpoint.open(self._room, asker)
        except ValueError as error:
            self._endpoint.observer.failed(self._room, Cause.ERROR, str(error))
            return Transfer(self._room, asker, TransferState.FAILED, str(error), Cause.ERROR, closed=True)
        weakref.finalize(self, self._endpoint.close, transfer).atexit = False
        return transfer

    def wait_for_others(self) -> None:
        """Opens the transfers of the other decode ranks, once one has said how many ask."""
        ask = self.transfers[0].ask
        if ask is not None and not self.transfers[0].closed:
            self.transfers += [self._open(asker) for asker in range(len(self.transfers), ask.num_askers)]

    @property
    def state(self) -> TransferState:
        return min((transfer.state for transfer in self.transfers), key=_WORST_FIRST.index)

    @property
    def failure(self) -> Failure | None:
        return next((Failure(transfer.reason, transfer.cause) for transfer in self.transfers if transfer.reason), None)

    @property
    def is_sending(self) -> bool:
        return all(transfer.is_sending for transfer in self.transfers)

    @property
    def has_contact(self) -> bool:
        """Whether a decode rank has spoken of the request."""
        return any(transfer.peer for transfer in self.transfers)

    @property
    def asks(self) -> list[Ask]:
        return [transfer.ask for transfer in self.transfers if transfer.ask is not None]

    @property
    def num_bytes(self) -> int:
        return sum(transfer.num_bytes for transfer in self.transfers)

    @property
    def seconds(self) -> float:
        return max(transfer.seconds for transfer in self.transfers)

    def announce(self, ranges: Sequence[PageRange]) -> None:
        for transfer in self.transfers:
            self._endpoint.announce(transfer, ranges)

    def end_prefill(self) -> None:
        for transfer in self.transfers:
            transfer.end_prefill()

    def send_pages(
        self, pages: PageRange, ids: PageIdsLater, layers: Sequence[int], is_final: IsFinal = always
    ) -> None:
        for transfer in self.transfers:
            self._endpoint.send_pages(transfer, pages, ids, layers, is_final)

    def finish(self, aux_index: int | None, info: Mapping[str, int | str]) -> None:
        for transfer in self.transfers:
            self._endpoint.finish(transfer, aux_index, info)

    def close(self, reason: str, cause: Cause = Cause.GIVEN_UP) -> None:
        """Tells every decode rank that still waits `reason`."""
        for transfer in self.transfers:
            self._endpoint.close(transfer, reason, cause)
