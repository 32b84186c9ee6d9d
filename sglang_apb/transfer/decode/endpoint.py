"""A decode rank's endpoint: one DEALER socket for each prefill rank. Asks for requests, and takes their KV."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import zmq

from sglang_apb.transfer.decode.assembly import Assembly
from sglang_apb.transfer.decode.peer import MAX_FRAMES_A_TURN, PrefillPeer
from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.loop import SocketLoop, buffers, keep_freed_memory, receive
from sglang_apb.transfer.memory.heads import PagesByHeads, Shares
from sglang_apb.transfer.memory.pages import PageIds, Pages, largest_payload
from sglang_apb.transfer.observer import Cause, Failure, Observer
from sglang_apb.transfer.planes.base import Pool
from sglang_apb.transfer.planes.pair import ZMQ_ONLY, ReceivePlanes
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.compat import Compat
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.keys import Keys
from sglang_apb.transfer.protocol.room_number import in_use
from sglang_apb.transfer.protocol.wire import Ask, Block, Buffer, Frame, Kind, Stop, WireError

logger = logging.getLogger(__name__)

# How often to look for blocks that never come.
CHECK_MS = 100
# A block that was asked for takes milliseconds, over a slow link tenths of a second.
ARRIVAL_GRACE_S = 1.0


class UnknownKeyError(ValueError):
    """A prefill rank's key is not among this server's peers."""


def _addresses(ranks: Sequence[Sequence[Any]]) -> tuple[Address, ...]:
    return tuple(Address(*rank) for rank in ranks)


@dataclass(frozen=True, eq=False)
class Expected:
    """A request that waits for KV memory, before its transfer is opened."""

    room: int
    ranks: tuple[Address, ...]
    on_lost: Callable[[Failure], None]


class DecodeEndpoint(SocketLoop):
    def __init__(
        self,
        pool: Pool,
        aux: Pages,
        compat: Compat,
        keys: Keys | None = None,
        *,
        with_metrics: bool = False,
        planes: ReceivePlanes = ZMQ_ONLY,
    ):
        """KV goes to the pages of `pool`, the first-token records to `aux`."""
        super().__init__("kv-decode", keys)
        keep_freed_memory()
        self._planes = planes
        self.observer = Observer("decode", with_metrics)
        self._pool, self._aux, self._compat = pool, aux, compat
        self._parts = PagesByHeads(pool.pages, pool.heads, pool.page_size)
        self._peers: dict[Address, PrefillPeer] = {}
        self._lock = threading.Lock()
        self._requests: dict[int, DecodeRequest] = {}  # by their rooms
        self._expected: dict[int, Expected] = {}

    def stop(self) -> None:
        """For tests, which free their pools then: nothing is written there any more."""
        self.call(self._close_peers)
        super().stop()

    def expect(
        self, room: int, ranks: Sequence[Sequence[Any]], on_lost: Callable[[Failure], None], asker: int = 0
    ) -> Expected:
        """Tells the ranks that they will be asked for a room, and watches them until it is opened.

        When one of them is gone, or gives the room up, `on_lost` is called with why, in this endpoint's thread. Raises
        ValueError when the room is in use, by a request that is open or expected.
        """
        expected, frame = Expected(room, _addresses(ranks), on_lost), wire.pack(Kind.EXPECT, room, 0, asker=asker)
        with self._lock:
            if room in self._requests or room in self._expected:
                raise ValueError(in_use(room))
            self._expected[room] = expected
        self.call(partial(self._send_all, expected.ranks, frame))
        return expected

    def expect_no_more(self, expected: Expected) -> None:
        with self._lock:
            if self._expected.get(expected.room) is expected:
                del self._expected[expected.room]

    def open(
        self,
        room: int,
        ranks: Sequence[Sequence[Any]],
        pages: PageIds,
        aux_index: int,
        prefix_tokens: int = 0,
        shares: Shares | None = None,
        *,
        expected: Expected | None = None,
        prompt: bytes = b"",
    ) -> DecodeRequest:
        """Asks every prefill rank for its part of `pages`; the first-token record goes to row `aux_index`.

        Without `shares` each rank has all of this rank's heads, and no other decode rank asks it for them. `expected`
        is what `expect` gave, if that was called; `prompt` the digest of the prompt, if it is known. Raises ValueError
        when the room is in use or a page is not in the pool, UnknownKeyError.
        """
        addresses = _addresses(ranks)
        self._check(addresses, pages)
        shares = shares or Shares(self._pool.heads, (self._pool.heads,) * len(addresses))
        opened = self._request(room, addresses, pages, aux_index, shares)
        asks = [
            Ask(
                *(self._compat, len(pages), prefix_tokens, (self._pool.heads.start, self._pool.heads.stop)),
                *(shares.num_askers, share, prompt),
            )
            for share in shares.page_shares
        ]
        frames = [wire.pack_message(ask, room, opened.attempt, shares.asker) for ask in asks]
        # From here on nothing may fail: what is open has to be closed before its pages are another request's.
        with self._lock:
            before = self._expected.get(room)
            if room in self._requests or (expected is not None and before not in (None, expected)):
                raise ValueError(in_use(room))
            self._requests[room] = opened
            self._expected.pop(room, None)
        for address, frame in zip(addresses, frames, strict=True):
            self.call(partial(self._send, address, frame))
        return opened

    def give_up(self, request: DecodeRequest, reason: str = "", cause: Cause = Cause.GIVEN_UP) -> None:
        """Forgets a request. Once nothing `is_arriving` there, its pages are never written again. For any thread."""
        with request.lock:
            if request.closed:
                return
            request.closed = True
        with self._lock:
            del self._requests[request.room]
        told = reason or "The decode server gave the request up."
        if request.state is RequestState.RECEIVING:
            self.observer.failed(request.room, cause, told)
        if request.state is not RequestState.COMPLETE:
            self.refuse(request.room, request.ranks, told, request.attempt, request.asker)

    def close(self, request: DecodeRequest, reason: str = "") -> None:
        """The same, and waits: when this returns, its pages are never written again. Not for this endpoint's thread.

        What a plane has on its way there, and of which nothing has arrived meanwhile, is ended: the prefill rank hangs.
        """
        self.give_up(request, reason)
        while not request.wait_for_arrivals(ARRIVAL_GRACE_S):
            self.call(partial(self._end_what_is_stuck, request))

    def refuse(self, room: int, ranks: Sequence[Sequence[Any]], reason: str, attempt: int = 0, asker: int = 0) -> None:
        """Tells prefill ranks that a room will not be received (attempt 0: it never was)."""
        frame = wire.pack_message(Stop(reason[:2000]), room, attempt, asker)
        self.call(partial(self._send_all, _addresses(ranks), frame))

    def work(self) -> int | None:
        """Finds blocks that do not come."""
        are_busy = [peer.pair.check() for peer in list(self._peers.values())]
        return CHECK_MS if any(are_busy) else None

    def _check(self, addresses: Sequence[Address], pages: PageIds) -> None:
        peers = self.keys.peers if self.keys is not None else None
        if peers is not None and (strange := next((a for a in addresses if not peers.allows(a.key)), None)):
            raise UnknownKeyError(f"The key of prefill rank {strange} is not among this server's peers.")
        num_pages = self._pool.pages.num_pages
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
            raise ValueError(f"Pages {pages.min()} to {pages.max()} leave [0, {num_pages}).")

    def _request(
        self, room: int, addresses: tuple[Address, ...], pages: PageIds, aux_index: int, shares: Shares
    ) -> DecodeRequest:
        sources = tuple(self._parts.of(part) for part in shares.of_ranks)
        return DecodeRequest(
            room=room,
            attempt=secrets.randbits(63) | 1,
            ranks=addresses,
            pages=pages,
            aux=self._aux,
            aux_index=aux_index,
            assembly=Assembly(sources[0].item_lens if sources else (), len(pages), shares.part_of_rank),
            sources=sources,
            parts=shares.of_ranks,
            observer=self.observer,
            asker=shares.asker,
        )

    def _send_all(self, ranks: Sequence[Address], frame: list[Buffer]) -> None:
        for address in ranks:
            self._send(address, frame)

    def _send(self, address: Address, frame: list[Buffer]) -> None:
        try:
            self._peer(address).socket.send_multipart(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._lose(address, f"Could not reach prefill rank {address} ({error}).")

    def _peer(self, address: Address) -> PrefillPeer:
        peer = self._peers.get(address)
        if peer is None:
            max_bytes = max(largest_payload(self._pool.pages, self._aux), wire.MAX_BODY_BYTES)
            peer = PrefillPeer(self, address, max_bytes, self._receive_some, partial(self._lose, address))
            self._peers[address] = peer
            peer.connect(self._planes, partial(self._send, address), self._place, self._fail)
            self.observer.has_peers(len(self._peers))
        return peer

    def _lose(self, address: Address, reason: str) -> None:
        """Fails the requests of a prefill rank that is gone. Its socket goes too: a new server has new ports."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.close()
            self.observer.has_peers(len(self._peers))
        with self._lock:
            affected = [request for request in self._requests.values() if address in request.ranks]
            waiting = [room for room, expected in self._expected.items() if address in expected.ranks]
        for request in affected:
            with request.lock:
                if not request.closed:
                    request.lost_rank = True
                    request.fail(reason, Cause.LOST)
        for room in waiting:
            self._disappoint(room, Failure(reason, Cause.LOST))

    def _fail(self, request: DecodeRequest, reason: str) -> None:
        with request.lock:
            if not request.closed:
                request.fail(reason, Cause.ERROR)

    def _close_peers(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _disappoint(self, room: int, failure: Failure) -> None:
        with self._lock:
            expected = self._expected.pop(room, None)
        if expected is not None:
            expected.on_lost(failure)

    def _end_what_is_stuck(self, request: DecodeRequest) -> None:
        for peer in [self._peers[address] for address in request.ranks if address in self._peers]:
            peer.pair.end_if_stuck(request, ARRIVAL_GRACE_S)

    def _receive_some(self, peer: PrefillPeer) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            if peer.socket.closed or (parts := receive(peer.socket)) is None:
                return
            try:
                self._dispatch(peer, wire.parse(buffers(parts)))
            except WireError as error:
                self.observer.refused_frame(str(peer.address), error)

    def _dispatch(self, peer: PrefillPeer, frame: Frame) -> None:
        if frame.kind is Kind.PING:
            return
        if peer.pair.speaks(frame):
            peer.pair.hear(frame)
            return
        with self._lock:
            request, expected = self._requests.get(frame.room), self._expected.get(frame.room)
        if frame.kind is Kind.STOP and not frame.attempt and expected is not None and peer.address in expected.ranks:
            self._disappoint(frame.room, Failure(wire.parse_message(frame, Stop).reason, Cause.PEER))
        elif request is None or request.attempt != frame.attempt or peer.address not in request.ranks:
            logger.debug("KV transfer: ignored %s for room %d: not open", wire.name_of(frame.kind), frame.room)
        else:
            self._take(request, peer, frame)

    def _take(self, request: DecodeRequest, peer: PrefillPeer, frame: Frame) -> None:
        with request.lock:
            if not request.is_receiving or request.hold_back(peer.address, frame):
                return
            is_done = request.take(request.ranks.index(peer.address), frame, peer.pair.take)
        if is_done:
            self._send_all(request.ranks, wire.pack(Kind.DONE, request.room, request.attempt, asker=request.asker))

    def _place(
        self, request: DecodeRequest, rank: int, block: Block, num_bytes: int, write: Callable[[], None] | None
    ) -> None:
        """A pending block has come. In a thread of its plane."""
        with request.lock:
            request.place(rank, block, num_bytes, write)
            if request.is_receiving and request.held_back and not request.pending:
                self.call(partial(self._catch_up, request))

    def _catch_up(self, request: DecodeRequest) -> None:
        with request.lock:
            held_back, request.held_back = request.held_back, []
        for address, frame in held_back:
            if (peer := self._peers.get(address)) is None:
                continue
            try:
                self._dispatch(peer, frame)
            except WireError as error:
                self.observer.refused_frame(str(address), error)
