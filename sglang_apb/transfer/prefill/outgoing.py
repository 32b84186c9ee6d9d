"""What a prefill rank has to send: one frame of one transfer after the other, as far as the decode ranks keep up."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import zmq

from sglang_apb.transfer.prefill.transfer import Frames, IsFinal, Transfer
from sglang_apb.transfer.protocol.wire import Buffer

logger = logging.getLogger(__name__)

RETRY_MS = 2


class Outgoing:
    """Everything is the endpoint's thread's. `lose` is told of a decode rank that is gone, `fail` of a transfer whose
    pages could not be read.
    """

    def __init__(
        self, socket: zmq.Socket, lose: Callable[[bytes, str], None], fail: Callable[[Transfer, str], None]
    ) -> None:
        self._socket, self._lose, self._fail = socket, lose, fail
        self._busy: deque[Transfer] = deque()
        self._num_waiting = 0

    def put(self, transfer: Transfer, frames: Callable[[], Frames], is_final: IsFinal) -> None:
        if not transfer.is_sending:
            return
        transfer.queue(frames(), is_final)
        if transfer not in self._busy:
            self._busy.append(transfer)

    def send_some(self, most_frames: int, idle_ms: int) -> int:
        """Sends up to `most_frames`. Returns how many milliseconds to wait then, `idle_ms` when all is sent."""
        wait = idle_ms
        for _ in range(most_frames):
            if not self._busy or (wait := self._send_one(idle_ms)):
                break
        return wait

    def _send_one(self, idle_ms: int) -> int:
        """One frame of one transfer."""
        transfer = self._busy.popleft()
        if self._send_next(transfer):
            self._busy.appendleft(transfer)
            self._num_waiting = 0
        elif transfer.has_more:
            self._busy.append(transfer)
            self._num_waiting += 1
        if not self._busy:
            return idle_ms
        if self._num_waiting < len(self._busy):
            return 0
        self._num_waiting = 0  # whatever ends the wait, each is looked at again
        return RETRY_MS

    def _send_next(self, transfer: Transfer) -> bool:
        """False when there is nothing that is final, or the decode rank is not keeping up."""
        frame = self._next_frame(transfer)
        if not transfer.is_sending:
            transfer.clear()
        if frame is None or not transfer.is_sending:
            return False
        try:
            self._socket.send_multipart([transfer.peer, *frame], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            transfer.put_back(frame)
            return False
        except zmq.ZMQError as error:
            self._lose(transfer.peer, f"Lost the connection to the decode server ({error}).")
            return False
        return True

    def _next_frame(self, transfer: Transfer) -> list[Buffer] | None:
        try:
            return transfer.next_frame() if transfer.is_sending else None
        except Exception as error:
            logger.exception("KV transfer: could not read the pages of room %d", transfer.room)
            self._fail(transfer, f"The prefill server could not read the request's pages: {error!r}.")
            return None
