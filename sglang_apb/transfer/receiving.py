"""Decode side: one DEALER socket for each prefill rank. Asks for rooms, writes what arrives into the pool."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zmq

from sglang_apb.transfer import wire
from sglang_apb.transfer.assembly import Assembly, TransferError
from sglang_apb.transfer.compat import Compat
from sglang_apb.transfer.config import CUDA_IPC, NCCL
from sglang_apb.transfer.direct import RemotePool
from sglang_apb.transfer.exchange import NUM_SLOTS
from sglang_apb.transfer.fetcher import Fetch, Fetcher
from sglang_apb.transfer.gpu_pages import CudaPages
from sglang_apb.transfer.heads import PagesByHeads, Shares
from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.inbox import ReceiveRoom, ReceiveState
from sglang_apb.transfer.keys import Keys
from sglang_apb.transfer.loop import SocketLoop, buffers, keep_freed_memory, receive
from sglang_apb.transfer.observer import Cause, Failure, Observer
from sglang_apb.transfer.pages import HostPages, PageIds, Pages, largest_payload
from sglang_apb.transfer.prefill_peer import MAX_FRAMES_A_TURN, PrefillPeer
from sglang_apb.transfer.room_number import in_use
from sglang_apb.transfer.ways import ZMQ_ONLY, Ways
from sglang_apb.transfer.wire import Announce, Ask, Buffer, End, Frame, Join, Kind, Stop, WireError

logger = logging.getLogger(__name__)

# How often to look for blocks that never come.
FETCH_POLL_MS = 100
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


class ReceivingEndpoint(SocketLoop):
    def __init__(
        self,
        pages: HostPages | CudaPages,
        aux: Pages,
        compat: Compat,
        heads: range,
        keys: Keys | None = None,
        *,
        with_metrics: bool = False,
        ways: Ways = ZMQ_ONLY,
    ):
        """`pages` hold the model's KV `heads`."""
        super().__init__("kv-receiving", keys)
        keep_freed_memory()
        self._ways = ways
        self.observer = Observer("decode", with_metrics)
        self._pages, self._aux, self._compat, self._heads = pages, aux, compat, heads
        self._parts = PagesByHeads(pages, heads, compat.page_size)
        self._peers: dict[Address, PrefillPeer] = {}
        self._lock = threading.Lock()
        self._rooms: dict[int, ReceiveRoom] = {}
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
            if room in self._rooms or room in self._expected:
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
    ) -> ReceiveRoom:
        """Asks every prefill rank for its part of `pages`; the first-token record goes to row `aux_index`.

        Without `shares` each rank has all of this rank's heads, and no other decode rank asks it for them. `expected`
        is what `expect` gave, if that was called; `prompt` the digest of the prompt, if it is known. Raises ValueError
        when the room is in use or a page is not in the pool, UnknownKeyError.
        """
        ranks = _addresses(ranks)
        if self.keys is not None and (strange := next((a for a in ranks if not self.keys.peers.allows(a.key)), None)):
            raise UnknownKeyError(f"The key of prefill rank {strange} is not among this server's peers.")
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < self._pages.num_pages:
            raise ValueError(f"Pages {pages.min()} to {pages.max()} leave [0, {self._pages.num_pages}).")
        shares = shares or Shares(self._heads, (self._heads,) * len(ranks))
        sources = tuple(self._parts.of(part) for part in shares.of_ranks)
        assembly = Assembly(sources[0].item_lens if sources else (), len(pages), shares.part_of_rank)
        attempt = secrets.randbits(63) | 1
        opened = ReceiveRoom(room, attempt, ranks, pages, aux_index, assembly, sources, shares.of_ranks, shares.asker)
        heads = (self._heads.start, self._heads.stop)
        asks = [
            Ask(self._compat, len(pages), prefix_tokens, heads, shares.num_askers, share, prompt)
            for share in shares.page_shares
        ]
        frames = [wire.pack_message(ask, room, attempt, shares.asker) for ask in asks]
        # From here on nothing may fail: what is open has to be closed before its pages are another request's.
        with self._lock:
            before = self._expected.get(room)
            if room in self._rooms or (expected is not None and before not in (None, expected)):
                raise ValueError(in_use(room))
            self._rooms[room] = opened
            self._expected.pop(room, None)
        for address, frame in zip(ranks, frames, strict=True):
            self.call(partial(self._send, address, frame))
        return opened

    def give_up(self, room: ReceiveRoom, reason: str = "", cause: Cause = Cause.GIVEN_UP) -> None:
        """Forgets a room. Once nothing `is_arriving` there, its pages are never written again. For any thread."""
        with room.lock:
            if room.closed:
                return
            room.closed = True
        with self._lock:
            del self._rooms[room.room]
        told = reason or "The decode server gave the request up."
        if room.state is ReceiveState.RECEIVING:
            self.observer.failed(room.room, cause, told)
        if room.state is not ReceiveState.COMPLETE:
            self.refuse(room.room, room.ranks, told, room.attempt, room.asker)

    def close(self, room: ReceiveRoom, reason: str = "") -> None:
        """The same, and waits: when this returns, its pages are never written again. Not for this endpoint's thread.

        A channel over which nothing has arrived meanwhile is ended, and what is on its way with it: the rank hangs.
        """
        self.give_up(room, reason)
        while not room.wait_for_arrivals(ARRIVAL_GRACE_S):
            self.call(partial(self._end_stuck_channels, room))

    def refuse(self, room: int, ranks: Sequence[Sequence[Any]], reason: str, attempt: int = 0, asker: int = 0) -> None:
        """Tells prefill ranks that a room will not be received (attempt 0: it never was)."""
        frame = wire.pack_message(Stop(reason[:2000]), room, attempt, asker)
        self.call(partial(self._send_all, _addresses(ranks), frame))

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
            peer = self._peers[address] = PrefillPeer(
                *(self, address, max(largest_payload(self._pages, self._aux), wire.MAX_BODY_BYTES), self._ways),
                send=partial(self._send, address),
                receive_some=self._receive_some,
                place=self._place,
                fail=self._fail_room,
                lose=partial(self._lose, address),
            )
            self.observer.has_peers(len(self._peers))
        return peer

    def _lose(self, address: Address, reason: str) -> None:
        """Fails the rooms of a prefill rank that is gone. Its socket goes too: a new server has new ports."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.close()
            self.observer.has_peers(len(self._peers))
        with self._lock:
            affected = [room for room in self._rooms.values() if address in room.ranks]
            waiting = [room for room, expected in self._expected.items() if address in expected.ranks]
        for room in affected:
            with room.lock:
                if not room.closed:
                    room.lost_rank = True
                    self._fail(room, reason, Cause.LOST)
        for room_id in waiting:
            self._disappoint(room_id, Failure(reason, Cause.LOST))

    def _fail_room(self, room: ReceiveRoom, reason: str) -> None:
        with room.lock:
            if not room.closed:
                self._fail(room, reason, Cause.ERROR)

    def _close_peers(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _disappoint(self, room: int, failure: Failure) -> None:
        with self._lock:
            expected = self._expected.pop(room, None)
        if expected is not None:
            expected.on_lost(failure)

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
        if frame.kind is Kind.JOIN:
            peer.way.join(wire.parse_message(frame, Join))
            return
        with self._lock:
            room, expected = self._rooms.get(frame.room), self._expected.get(frame.room)
        if frame.kind is Kind.STOP and not frame.attempt and expected is not None and peer.address in expected.ranks:
            self._disappoint(frame.room, Failure(wire.parse_message(frame, Stop).reason, Cause.PEER))
            return
        if room is None or room.attempt != frame.attempt or peer.address not in room.ranks:
            logger.debug("KV transfer: ignored %s for room %d: not open", frame.kind.name, frame.room)
            return
        with room.lock:
            if room.closed or room.state is not ReceiveState.RECEIVING:
                return
            if (room.fetching or room.held_back) and frame.kind in (Kind.AUX, Kind.END):
                if len(room.held_back) >= 2 * len(room.ranks):
                    raise WireError(f"{frame.kind.name} again, while blocks are on their way")
                room.held_back.append((peer, frame))
                return
            try:
                self._take(room, room.ranks.index(peer.address), frame, peer)
            except TransferError as error:
                self._fail(room, str(error), Cause.PEER if frame.kind is Kind.STOP else Cause.INCOMPLETE)
                return
            is_whole = room.assembly.complete
            if is_whole and not room.unconfirmed:
                self._finish(room)
        if is_whole and frame.kind is not Kind.KEPT:
            self._send_all(room.ranks, wire.pack(Kind.DONE, room.room, room.attempt, asker=room.asker))

    def _take(self, room: ReceiveRoom, rank: int, frame: Frame, peer: PrefillPeer) -> None:
        assembly = room.assembly
        if frame.kind is Kind.DATA:
            self._write(room, rank, frame)
        elif frame.kind is Kind.OFFER:
            self._pull(room, rank, frame, peer.way.remote)
        elif frame.kind is Kind.READY:
            self._queue(room, rank, frame, peer.way.fetcher)
        elif frame.kind is Kind.ANNOUNCE:
            assembly.announce(rank, wire.parse_message(frame, Announce))
        elif frame.kind is Kind.AUX:
            self._take_aux(room, rank, frame)
        elif frame.kind is Kind.END:
            assembly.end(rank, wire.parse_message(frame, End))
        elif frame.kind is Kind.KEPT:
            room.confirm(rank)
        elif frame.kind is Kind.STOP:
            raise TransferError(wire.parse_message(frame, Stop).reason)
        else:
            raise WireError(f"{frame.kind.name} is not for a decode server")

    def _write(self, room: ReceiveRoom, rank: int, frame: Frame) -> None:
        room.started = room.started or time.monotonic()
        source = room.sources[rank]
        block = wire.parse_block(frame, source.item_lens, len(room.pages))
        room.assembly.check_block(rank, block)
        ids = room.pages[block.first_page : block.first_page + block.num_pages]
        payload = frame.payload or b""
        source.scatter(block.first_buffer, block.num_buffers, ids, payload)
        room.assembly.add_block(rank, block, len(payload))

    def _pull(self, room: ReceiveRoom, rank: int, frame: Frame, remote: RemotePool | None) -> None:
        if remote is None:
            raise WireError(f"rank {rank} offered pages, and its pool is not mapped here")
        room.started = room.started or time.monotonic()
        item_lens = room.sources[rank].item_lens
        block, source_ids = wire.parse_offer(frame, len(item_lens), len(room.pages), remote.num_pages)
        room.assembly.check_block(rank, block)
        ids = room.pages[block.first_page : block.first_page + block.num_pages]
        try:
            remote.pull(room.parts[rank], block, source_ids, ids)
        except RuntimeError as error:
            raise TransferError(f"The KV pool of prefill rank {rank} could not be read: {error}") from error
        room.data_plane = CUDA_IPC
        room.unconfirmed.add(rank)
        room.assembly.add_block(rank, block, wire.block_bytes(block, item_lens))

    def _queue(self, room: ReceiveRoom, rank: int, frame: Frame, fetcher: Fetcher | None) -> None:
        if fetcher is None:
            raise WireError(f"rank {rank} has a block ready, and there is no channel to it")
        room.started = room.started or time.monotonic()
        item_lens = room.sources[rank].item_lens
        block = wire.parse_ready(frame, len(item_lens), len(room.pages))
        room.assembly.check_block(rank, block)
        if (num_bytes := wire.block_bytes(block, item_lens)) > (most := fetcher.channel.slot_bytes):
            raise WireError(f"rank {rank} has a block of {num_bytes} bytes ready, at most {most} are fetched")
        room.data_plane = NCCL
        if (rank, block) in room.fetching:
            raise WireError(f"rank {rank} has {block} ready twice")
        if sum(of == rank for of, _ in room.fetching) >= 2 * NUM_SLOTS:  # in slots of its own, and of this side
            raise WireError(f"rank {rank} has more blocks ready than it has slots")
        room.fetching.add((rank, block))
        fetcher.add(Fetch(room, rank, block, num_bytes))

    def work(self) -> int | None:
        """Finds blocks that do not come."""
        are_busy = [peer.way.check() for peer in list(self._peers.values())]
        return FETCH_POLL_MS if any(are_busy) else None

    def _end_stuck_channels(self, room: ReceiveRoom) -> None:
        for peer in [self._peers[address] for address in room.ranks if address in self._peers]:
            peer.way.end_if_stuck(room, ARRIVAL_GRACE_S)

    def _place(self, fetch: Fetch, write: Callable[[], None] | None) -> None:
        """Takes a block that has come over a channel; `write`, if any, brings it to its pages. In a thread of the
        channel.
        """
        room, block = fetch.room, fetch.block
        with room.lock:
            room.fetching.discard((fetch.rank, block))
            if room.closed or room.state is not ReceiveState.RECEIVING:
                return
            try:
                room.assembly.check_block(fetch.rank, block)
                if write is not None:
                    write()
            except Exception as error:  # whatever it was: the rest of the request waits for this block
                self._fail(room, f"A block of prefill rank {fetch.rank} could not be placed: {error}.", Cause.ERROR)
                return
            room.assembly.add_block(fetch.rank, block, fetch.num_bytes)
            if room.held_back and not room.fetching:
                self.call(partial(self._catch_up, room))

    def _catch_up(self, room: ReceiveRoom) -> None:
        with room.lock:
            held_back, room.held_back = room.held_back, []
        for peer, frame in held_back:
            try:
                self._dispatch(peer, frame)
            except WireError as error:
                self.observer.refused_frame(str(peer.address), error)

    def _take_aux(self, room: ReceiveRoom, rank: int, frame: Frame) -> None:
        payload, expected = frame.payload or b"", sum(self._aux.item_lens)
        if len(payload) != expected:
            raise WireError(f"AUX: payload of {len(payload)} bytes, a first-token record has {expected}")
        room.assembly.add_aux(rank, bytes(payload))

    def _finish(self, room: ReceiveRoom) -> None:
        # Only now: until then SGLang sees the row as not written.
        row = np.array([room.aux_index], np.int64)
        self._aux.scatter(0, len(self._aux.item_lens), row, room.assembly.aux or b"")
        room.finished = time.monotonic()
        room.state = ReceiveState.COMPLETE
        self.observer.ended(room.room, room.assembly.num_bytes, room.assembly.num_hidden_bytes, room.seconds)

    def _fail(self, room: ReceiveRoom, reason: str, cause: Cause) -> None:
        if room.state is ReceiveState.RECEIVING:
            self.observer.failed(room.room, cause, reason)
            room.cause, room.reason = cause, reason
            room.state = ReceiveState.FAILED
