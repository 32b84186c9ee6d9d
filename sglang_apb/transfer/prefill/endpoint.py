"""A prefill rank's endpoint: one ROUTER socket, to which decode ranks connect. They ask for requests, and get pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np
import zmq

from sglang_apb.transfer.loop import SocketLoop, buffers, guard, receive, sender_key
from sglang_apb.transfer.memory.heads import PagesByHeads, find_no_overlap, overlap
from sglang_apb.transfer.memory.pages import PageIdsLater, Pages, layer_buffers
from sglang_apb.transfer.observer import Cause, Observer
from sglang_apb.transfer.planes.base import OpenSend, Part, Pool, SendHalf
from sglang_apb.transfer.prefill.notices import MAX_REASON_CHARS, Notice
from sglang_apb.transfer.prefill.outgoing import RETRY_MS, Outgoing
from sglang_apb.transfer.prefill.peers import DecodePeers
from sglang_apb.transfer.prefill.transfer import Frames, IsFinal, Transfer, TransferState, always
from sglang_apb.transfer.prefill.transfers import Transfers
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.compat import Compat, find_difference
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.keys import Keys
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.room_number import in_use
from sglang_apb.transfer.protocol.wire import Announce, Ask, Buffer, End, Frame, Kind, Stop, WireError

logger = logging.getLogger(__name__)

# Bounds what waits in this process for a slow decode server: about 20 MB of blocks each.
SEND_HIGH_WATER_MARK = 8
PROBE_MS = 250
MAX_FRAMES_A_TURN = 64


class PrefillEndpoint(SocketLoop):
    """Listens on `host` at `port`; 0 is any that is free. Asks wait in the socket until `start_sending`, when the pool
    exists.
    """

    def __init__(
        self,
        host: str,
        notice_seconds: float = 300.0,
        keys: Keys | None = None,
        *,
        port: int = 0,
        contact_seconds: float = 30.0,
        with_metrics: bool = False,
    ):
        super().__init__("kv-prefill", keys)
        self._contact_seconds = contact_seconds
        self._last_pass = 0.0
        self.observer = Observer("prefill", with_metrics)
        self._socket = self.context.socket(zmq.ROUTER)
        self._peers = DecodePeers(self._socket)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        guard(self._socket, wire.MAX_BODY_BYTES)
        if keys is not None:
            keys.listen(self._socket)
        self.port = self._listen(f"tcp://[{host}]" if ":" in host else f"tcp://{host}", port)
        self.address = str(Address(host, self.port))
        self.transfers = Transfers(notice_seconds)
        self.halves: list[SendHalf] = []
        self._outgoing = Outgoing(self._socket, self._lose, self._fail_both)
        self._next_probe = 0.0

    def _listen(self, place: str, port: int) -> int:
        if port == 0:
            return self._socket.bind_to_random_port(place)
        try:
            self._socket.bind(f"{place}:{port}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"a prefill rank cannot listen at {place}:{port}: {error}") from error
        return port

    def start_sending(self, pool: Pool, aux: Pages, compat: Compat, planes: Sequence[OpenSend]) -> None:
        """`planes` bring the pages of `pool` to decode ranks: the first of them that serves one does."""
        self._aux, self._compat, self._heads = aux, compat, pool.heads
        self._pages = PagesByHeads(pool.pages, pool.heads, pool.page_size)
        self.halves = [make(self) for make in planes]
        self._by_kind = {kind: half for half in self.halves for kind in half.kinds}
        self.watch(self._socket, self._receive_all)
        self.start()

    def stop(self) -> None:
        for half in self.halves:
            half.stop()
        super().stop()

    def open(self, room: int, asker: int = 0) -> Transfer:
        """Raises ValueError when the room is open already."""
        opened, notice = self.transfers.open(room, asker)
        if notice is not None:
            self.call(partial(self._apply, opened, notice, was_early=True))
        return opened

    def announce(self, transfer: Transfer, ranges: Sequence[PageRange]) -> None:
        """Says which pages this rank sends; before any `send_pages`."""
        transfer.start()
        self._put(transfer, lambda: iter([transfer.pack_message(Announce(list(ranges)))]))

    def send_pages(
        self, transfer: Transfer, pages: PageRange, ids: PageIdsLater, layers: Sequence[int], is_final: IsFinal = always
    ) -> None:
        """Queues pages [start, end) of the request in `layers`; `ids` gives where they are in the pool.

        Nothing is read, and `ids` not called, before `is_final` says that it may be.
        """
        for of_layers in layer_buffers(layers):
            self._put(transfer, partial(self._bring, transfer, pages, ids, of_layers), is_final)

    def finish(self, transfer: Transfer, aux_index: int | None, info: Mapping[str, int | str]) -> None:
        """Queues the aux row (None on ranks that do not hold it) and the end."""
        frames = partial(self._tail, transfer, aux_index, dict(info))
        self._put(transfer, frames, lambda: all(half.is_read(transfer) for half in self.halves))

    def close(self, transfer: Transfer, reason: str = "", cause: Cause = Cause.GIVEN_UP) -> None:
        """Forgets a transfer and tells a decode server that still waits for it `reason`.

        For its owner, and for the garbage collector when there is none any more. That runs in any thread, in the midst
        of anything, so no lock is taken here: what else is to be done, the loop's thread does.
        """
        if not transfer.closed:
            transfer.closed = True
            self.call(partial(self._drop, transfer, reason or "The prefill server gave the request up.", cause))

    def refuse(self, room: int, reason: str) -> None:
        """Tells decode servers that wait for a request which this server has refused before it was opened."""
        self.call(partial(self._refuse_all, room, reason))

    def pass_scheduler(self) -> None:
        """What this rank's scheduler has been sent until now is open. While it computes, time does not count."""
        self._last_pass = time.monotonic()

    def work(self) -> int | None:
        if time.monotonic() >= self._next_probe:
            self._next_probe = time.monotonic() + PROBE_MS / 1000
            self._probe()
        wait = self._outgoing.send_some(MAX_FRAMES_A_TURN, idle_ms=PROBE_MS)
        return wait if self._peers.flush() else min(wait, RETRY_MS)

    # What data planes may ask of it (`planes.base.SendSide`), beside `address` and `call`.

    def reply(self, peer: bytes, frame: list[Buffer]) -> None:
        self._peers.reply(peer, frame)

    def find_asked(self, peer: bytes, frame: Frame) -> Transfer | None:
        return self.transfers.find_asked(peer, frame)

    def fail_all(self, peer: bytes, reason: str) -> None:
        for transfer in self.transfers.of(peer):
            if transfer.is_sending:
                self._fail_both(transfer, reason)

    def _put(self, transfer: Transfer, frames: Callable[[], Frames], is_final: IsFinal = always) -> None:
        self.call(partial(self._outgoing.put, transfer, frames, is_final))

    def _bring(self, transfer: Transfer, pages: PageRange, ids: PageIdsLater, of_layers: range) -> Frames:
        heads = overlap(self._heads, range(*transfer.ask.heads) if transfer.ask else self._heads)
        part = Part(pages, of_layers, heads, ids(), self._pages.of(heads))
        half = next(half for half in self.halves if half.serves(transfer.peer, part.pages.item_lens))
        yield from half.frames(transfer, part)

    def _tail(self, transfer: Transfer, aux_index: int | None, info: dict[str, int | str]) -> Frames:
        """The aux row, if this rank has it, and the end."""
        if aux_index is not None:
            row = self._aux.gather(0, len(self._aux.item_lens), np.array([aux_index], np.int64))
            yield transfer.pack(Kind.AUX, payload=row.data)
        yield transfer.pack_message(End(transfer.num_bytes, transfer.num_hidden_bytes, info))

    def _probe(self) -> None:
        for peer, why in self._peers.find_lost():
            self._lose(peer, f"Lost the connection to the decode server ({why}).")
        for notice in self.transfers.overdue(self._contact_seconds, self._last_pass):
            reason = (
                f"The prefill server has not got the request within {self._contact_seconds:g} s: was it asked, "
                "and did it refuse?"
            )
            self._refuse_all(notice.frame.room, reason)
        self.observer.has_peers(len(self._peers))

    def _receive_all(self) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            if (message := receive(self._socket, wire.MAX_PARTS + 1)) is None:
                return
            envelope, *parts = buffers(message)
            peer = bytes(envelope)
            if self.keys is not None and not self.keys.peers.allows(sender_key(message[0])):
                self._shut_out(peer, parts)
            else:
                self._receive(peer, parts)

    def _receive(self, peer: bytes, parts: Sequence[Buffer]) -> None:
        try:
            frame = wire.parse(parts)
            if frame.kind is Kind.PING:
                self._peers.hear(peer)
            else:
                self._dispatch(peer, frame)
                self._peers.add(peer)
        except wire.VersionError as error:
            reason = (
                f"The decode server speaks wire version {error.version}, the prefill server "
                f"{wire.VERSION}: install the same version of sglang-apb on both."
            )
            self._settle(self._notice(peer, error.frame, reason))
        except WireError as error:
            self.observer.refused_frame("a decode server", error)

    def _dispatch(self, peer: bytes, frame: Frame) -> None:
        if frame.kind is Kind.ASK:
            ask = wire.parse_message(frame, Ask)
            reason = find_difference(self._compat, ask.compat) or find_no_overlap(self._heads, range(*ask.heads))
            # What is kept must be small, whatever was sent: not the frame's body, nor lists that do not fit.
            kept = None if reason else msgspec.structs.replace(ask, compat=self._compat)
            self._settle(self._notice(peer, frame, reason, kept))
        elif frame.kind is Kind.EXPECT:
            self._settle(self._notice(peer, frame))
        elif frame.kind is Kind.STOP:
            self._settle(self._notice(peer, frame, wire.parse_message(frame, Stop).reason))
        elif frame.kind is Kind.DONE:
            self._complete(peer, frame)
        elif (half := self._by_kind.get(frame.kind)) is not None:
            half.take(peer, frame)
        else:
            raise WireError(f"{wire.name_of(frame.kind)} is not for a prefill server")

    def _notice(self, peer: bytes, frame: Frame, reason: str | None = "", ask: Ask | None = None) -> Notice:
        return Notice.of(peer, frame, self.transfers.notice_seconds, reason or "", ask)

    def _shut_out(self, peer: bytes, parts: Sequence[Buffer]) -> None:
        """Its key has been revoked, and it still speaks over a connection that is there."""
        for half in self.halves:
            half.shut_out(peer)
        stop = Stop("This server's key has been revoked.")
        self._peers.reply(peer, wire.pack_message(stop, *wire.place_of(parts)))

    def _settle(self, notice: Notice) -> None:
        """Applies what a decode server says now, or keeps it until the request is opened here."""
        transfer, reason = self.transfers.settle(notice)
        if transfer is not None:
            self._apply(transfer, notice)
        elif reason and notice.frame.kind in (Kind.ASK, Kind.EXPECT):
            self._refuse(notice, reason)

    def _apply(self, transfer: Transfer, notice: Notice, was_early: bool = False) -> None:
        if notice.frame.kind is Kind.EXPECT:
            if transfer.state is TransferState.UNASKED and not transfer.peer:
                transfer.peer = notice.peer
        elif notice.frame.kind is Kind.STOP:
            self._apply_stop(transfer, notice, was_early)
        else:
            self._apply_ask(transfer, notice)

    def _apply_stop(self, transfer: Transfer, notice: Notice, was_early: bool) -> None:
        is_theirs = transfer.peer in (b"", notice.peer)
        unasked = transfer.state is TransferState.UNASKED and is_theirs and (was_early or notice.frame.attempt == 0)
        if unasked or (transfer.peer, transfer.attempt) == (notice.peer, notice.frame.attempt):
            self._fail(transfer, notice.reason or "The decode server gave the request up.", notice.cause)

    def _apply_ask(self, transfer: Transfer, notice: Notice) -> None:
        if transfer.state is not TransferState.UNASKED or transfer.closed or transfer.peer not in (b"", notice.peer):
            self._refuse(notice, transfer.reason or in_use(transfer.room))
            return
        transfer.peer, transfer.attempt, transfer.ask = notice.peer, notice.frame.attempt, notice.ask
        if notice.reason:
            self._fail_both(transfer, notice.reason, Cause.MISFIT)
        else:
            transfer.state = TransferState.ASKED

    def _refuse_all(self, room: int, reason: str) -> None:
        for notice in self.transfers.refuse(room, reason):
            self._refuse(notice, reason)

    def _refuse(self, notice: Notice, reason: str) -> None:
        frame = notice.frame
        stop = Stop(reason[:MAX_REASON_CHARS])
        self._peers.reply(notice.peer, wire.pack_message(stop, frame.room, frame.attempt, frame.asker))

    def _complete(self, peer: bytes, frame: Frame) -> None:
        transfer = self.transfers.find_asked(peer, frame)
        if transfer is not None and transfer.state is TransferState.ASKED:
            for half in self.halves:
                half.confirm(transfer)
            transfer.finished = time.monotonic()
            transfer.state = TransferState.DONE
            self.observer.ended(transfer.room, transfer.num_bytes, transfer.num_hidden_bytes, transfer.seconds)

    def _lose(self, peer: bytes, reason: str) -> None:
        """Fails what a decode server that is gone had asked for, or was going to."""
        self._peers.forget(peer)
        for half in self.halves:
            half.lose(peer)
        for transfer in self.transfers.lose(peer, reason):
            self._fail(transfer, reason, Cause.LOST)

    def _drop(self, transfer: Transfer, reason: str, cause: Cause) -> None:
        self.transfers.remove(transfer)
        self._clear(transfer)
        if transfer.is_open:
            self.observer.failed(transfer.room, cause, reason)
            if transfer.peer:
                self._tell(transfer, reason)
        if transfer.state in (TransferState.UNASKED, TransferState.FAILED):
            self.transfers.give_up(transfer, transfer.reason or reason)

    def _fail_both(self, transfer: Transfer, reason: str, cause: Cause = Cause.ERROR) -> None:
        """Here, and at the decode rank."""
        self._fail(transfer, reason, cause)
        self._tell(transfer, transfer.reason)

    def _fail(self, transfer: Transfer, reason: str, cause: Cause) -> None:
        if transfer.is_open:
            self.observer.failed(transfer.room, cause, reason)
            transfer.cause, transfer.reason = cause, reason
            transfer.state = TransferState.FAILED
        self._clear(transfer)

    def _tell(self, transfer: Transfer, reason: str) -> None:
        self._peers.reply(transfer.peer, transfer.pack_message(Stop(reason[:MAX_REASON_CHARS])))

    def _clear(self, transfer: Transfer) -> None:
        transfer.clear()
        for half in self.halves:
            half.drop(transfer)
