"""Decode side: by which way pages of one prefill rank get here, of those that `data_plane` allows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sglang_apb.transfer import wire
from sglang_apb.transfer.direct import DirectError, MapMemory, RemotePool, map_pool
from sglang_apb.transfer.exchange import MIN_SLOT_BYTES, ExchangeError, Meeting, ReceivingChannel
from sglang_apb.transfer.fetcher import Fetcher, Place
from sglang_apb.transfer.inbox import ReceiveRoom
from sglang_apb.transfer.wire import Buffer, Join, WireError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ways:
    """The first that works with a prefill rank: its pool is mapped, a channel to it is made, or `zmq_too`."""

    map_memory: MapMemory | None = None
    meeting: Meeting | None = None
    zmq_too: bool = True


ZMQ_ONLY = Ways()


class Way:
    """To the prefill rank at `address`, for which this side is called `identity`. Until a better one is found, in
    threads of their own, KV comes over ZMQ.

    `remote` is its pool, once that can be read as it lies; `fetcher` gets blocks, once there is a channel, and has each
    of them taken by `place`; what waits for one that will not come is told to `fail`. `call` runs a command in the
    endpoint's thread, in which `send`, `fail` and `lose` have to run, and everything else here.
    """

    def __init__(
        self,
        ways: Ways,
        address: str,
        identity: bytes,
        call: Callable[[Callable[[], None]], None],
        send: Callable[[list[Buffer]], None],
        place: Place,
        fail: Callable[[ReceiveRoom, str], None],
        lose: Callable[[str], None],
    ):
        self.remote: RemotePool | None = None
        self.fetcher: Fetcher | None = None
        self._ways, self._address, self._identity = ways, address, identity
        self._call, self._send, self._place, self._fail, self._lose = call, send, place, fail, lose
        self._lock = threading.Lock()
        self._is_closed = self._is_waiting = False
        if ways.map_memory is not None or ways.meeting is not None:
            threading.Thread(target=self._find, name="kv-way", daemon=True).start()

    def join(self, join: Join) -> None:
        """What a prefill rank answers: where to meet, or why not, or not any more.

        Raises WireError when it was not asked, or has answered.
        """
        if not join.reason and not self._is_waiting:
            raise WireError("JOIN that nobody asked for")
        self._is_waiting = False
        if self.fetcher is not None:
            for room in self.fetcher.rooms:
                self._fail(room, f"The channel to prefill rank {self._address} is closed ({join.reason}).")
            self.fetcher.close()
            self.fetcher = None
        if join.reason:
            self._do_without(f"There is no channel to prefill rank {self._address}: {join.reason}")
        elif self._ways.meeting is not None:
            make = partial(self._make_channel, self._ways.meeting, join.unique_id, join.slot_bytes)
            threading.Thread(target=make, name="kv-channel", daemon=True).start()

    def close(self) -> None:
        """A process that ends leaves its memory to those who have it mapped: its successor may need it."""
        with self._lock:
            self._is_closed = True
            if self.remote is not None:
                _close(self.remote)
        if self.fetcher is not None:
            self.fetcher.close()

    def _find(self) -> None:
        reason = ""
        if self._ways.map_memory is not None:
            try:
                map_pool(self._address, self._identity, self._ways.map_memory, self._keep_remote)
                return
            except DirectError as error:
                reason = f"The KV pool of prefill rank {self._address} cannot be read where it lies: {error}"
        try:
            if self._ways.meeting is not None:
                self._ways.meeting.check_memory(self._ways.meeting.slot_bytes)
                self._call(partial(self._ask_to_join, self._ways.meeting))
                return
        except RuntimeError as error:
            reason = f"There can be no channel to prefill rank {self._address}: {error}"
        self._call(partial(self._do_without, reason))

    def _ask_to_join(self, meeting: Meeting) -> None:
        if not self._is_closed:
            self._is_waiting = True
            self._send(wire.pack_message(Join(gpu=meeting.gpu, slot_bytes=meeting.slot_bytes), 0, 0))

    def _keep_remote(self, remote: RemotePool) -> None:
        with self._lock:
            self.remote = remote
            logger.info("KV transfer: KV of prefill rank %s comes over cuda_ipc", self._address)
            if self._is_closed:
                _close(remote)

    def _make_channel(self, meeting: Meeting, unique_id: bytes, slot_bytes: int) -> None:
        try:
            if not MIN_SLOT_BYTES <= slot_bytes <= meeting.slot_bytes:
                raise ExchangeError(f"it wants slots of {slot_bytes} bytes, of {meeting.slot_bytes}")
            channel = meeting.receiver(unique_id, slot_bytes, lambda reason: self._call(partial(self._break, reason)))
        except Exception as error:
            self._call(partial(self._do_without, f"There is no channel to prefill rank {self._address}: {error}"))
        else:
            self._call(partial(self._keep_channel, channel, unique_id))

    def _keep_channel(self, channel: ReceivingChannel, unique_id: bytes) -> None:
        if self._is_closed:
            channel.close()
            return
        logger.info("KV transfer: KV of prefill rank %s comes over nccl", self._address)
        self.fetcher = Fetcher(channel, self._send, self._call, self._place)
        self._send(wire.pack_message(Join(unique_id=unique_id), 0, 0))

    def check(self) -> bool:
        """Whether there is something to look after: blocks that are coming, which must not take too long."""
        if self.fetcher is None or not self.fetcher.is_busy:
            return False
        try:
            self.fetcher.check()
        except ExchangeError as error:
            self._break(str(error))
        return True

    def end_if_stuck(self, room: ReceiveRoom, seconds: float) -> None:
        """Ends the channel, if something is on its way there to a request, and nothing has come for so long."""
        if self.fetcher is not None and room in self.fetcher.rooms and self.fetcher.idle_seconds > seconds:
            self._break(f"nothing has come for {seconds:g} s, and a request that has ended waits for it")

    def _break(self, reason: str) -> None:
        if not self._is_closed and self.fetcher is not None:
            self._lose(f"The channel to prefill rank {self._address} does not work ({reason}).")

    def _do_without(self, reason: str) -> None:
        if self._is_closed:
            return
        if self._ways.zmq_too:
            logger.info("KV transfer: KV comes over zmq. %s", reason)
        else:
            self._lose(reason)


def _close(remote: RemotePool) -> None:
    try:
        remote.close()
    except DirectError as error:
        logger.warning("KV transfer: a prefill rank's pool could not be unmapped: %s", error)
