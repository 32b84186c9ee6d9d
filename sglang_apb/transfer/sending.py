"""Prefill side: one ROUTER socket a rank. Decode servers connect, ask for rooms, and get their pages."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import zmq

from sglang_apb.transfer import blocks, wire
from sglang_apb.transfer.compat import Compat, find_difference
from sglang_apb.transfer.decode_peers import DecodePeers
from sglang_apb.transfer.direct import Memory, MemoryServer
from sglang_apb.transfer.early import MAX_REASON_CHARS, Early
from sglang_apb.transfer.exchange import Meeting, PrefillEnds
from sglang_apb.transfer.gpu_pages import CudaPages
from sglang_apb.transfer.heads import PagesByHeads, find_no_overlap, overlap
from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.keys import Keys
from sglang_apb.transfer.loop import SocketLoop, buffers, guard, receive, sender_key
from sglang_apb.transfer.observer import Cause, Observer
from sglang_apb.transfer.outbox import Frames, IsFinal, Parcel, SendRoom, SendState, always
from sglang_apb.transfer.ownership import PageRange
from sglang_apb.transfer.pages import HostPages, PageIdsLater, Pages, layer_buffers
from sglang_apb.transfer.room_number import in_use
from sglang_apb.transfer.rooms import SendRooms
from sglang_apb.transfer.wire import Announce, Ask, Buffer, Frame, Join, Kind, Stop, WireError

logger = logging.getLogger(__name__)

# Bounds what waits in this process for a slow decode server: about 20 MB of blocks each.
SEND_HIGH_WATER_MARK = 8
RETRY_MS = 2
PROBE_MS = 250
MAX_FRAMES_A_TURN = 64


class SendingEndpoint(SocketLoop):
    """Listens on `host` at `port`. Asks wait in the socket until `start_sending`, when the pool exists."""

    def __init__(
        self,
        host: str,
        early_ask_seconds: float = 300.0,
        keys: Keys | None = None,
        *,
        contact_seconds: float = 30.0,
        with_metrics: bool = False,
    ):
        super().__init__("kv-sending", keys)
        self._contact_seconds = contact_seconds
        self._last_pass = 0.0
        self.observer = Observer("prefill", with_metrics)
        self._host = host
        self._memory_server: MemoryServer | None = None
        self._socket = self.context.socket(zmq.ROUTER)
        self._peers = DecodePeers(self._socket)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        guard(self._socket, wire.MAX_BODY_BYTES)
        if keys is not None:
            keys.listen(self._socket)
        self.port = self._socket.bind_to_random_port(f"tcp://[{host}]" if ":" in host else f"tcp://{host}")
        self.rooms = SendRooms(early_ask_seconds)
        self._busy: deque[SendRoom] = deque()
        self._num_waiting = 0
        self._next_probe = 0.0

    def start_sending(
        self,
        pages: HostPages | CudaPages,
        aux: Pages,
        compat: Compat,
        heads: range,
        memory: Memory | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        """`pages` hold the model's KV `heads`. Decode ranks that can map `memory` read pages where they lie; with a
        `meeting`, others may ask for a channel.
        """
        if meeting is not None:
            self._peers.ends = PrefillEnds(meeting, self.call, self._answer_join, self._lose_channel)
        self._aux, self._compat, self._heads = aux, compat, heads
        self._parts = PagesByHeads(pages, heads, compat.page_size)
        if memory is not None:
            self._memory_server = self._serve_memory(memory)
        self.watch(self._socket, self._receive_all)
        self.start()

    def stop(self) -> None:
        if self._memory_server is not None:
            self._memory_server.stop()
        super().stop()

    def open(self, room: int, asker: int = 0) -> SendRoom:
        """Raises ValueError when the room is open already."""
        opened, early = self.rooms.open(room, asker)
        if early is not None:
            self.call(partial(self._apply, opened, early, was_early=True))
        return opened

    def announce(self, room: SendRoom, ranges: Sequence[PageRange]) -> None:
        """Says which pages this rank sends; before any `send_pages`."""
        room.start()
        self._put(room, lambda: iter([room.pack(Announce(list(ranges)))]))

    def send_pages(
        self, room: SendRoom, pages: PageRange, ids: PageIdsLater, layers: Sequence[int], is_final: IsFinal = always
    ) -> None:
        """Queues pages [start, end) of the request in `layers`; `ids` gives where they are in the pool.

        Nothing is read, and `ids` not called, before `is_final` says that it may be.
        """
        for of_layers in layer_buffers(layers):
            self._put(room, partial(self._blocks, room, pages, ids, of_layers), is_final)

    def finish(self, room: SendRoom, aux_index: int | None, info: Mapping[str, int | str]) -> None:
        """Queues the aux row (None on ranks that do not hold it) and the end."""
        self._put(room, partial(blocks.tail, room, self._aux, aux_index, dict(info)), room.needs_no_pages)

    def close(self, room: SendRoom, reason: str = "", cause: Cause = Cause.GIVEN_UP) -> None:
        """Forgets a room and tells a decode server that still waits for it `reason`.

        For its owner, and for the garbage collector when there is none any more. That runs in any thread, in the midst
        of anything, so no lock is taken here: what else is to be done, the loop's thread does.
        """
        if not room.closed:
            room.closed = True
            self.call(partial(self._drop, room, reason or "The prefill server gave the request up.", cause))

    def refuse(self, room: int, reason: str) -> None:
        """Tells decode servers that wait for a request which this server has refused before it was opened."""
        self.call(partial(self._refuse_all, room, reason))

    def _refuse_all(self, room: int, reason: str) -> None:
        for early in self.rooms.refuse(room, reason):
            self._refuse(early, reason)

    def pass_scheduler(self) -> None:
        """What this rank's scheduler has been sent until now is open. While it computes, time does not count."""
        self._last_pass = time.monotonic()

    def work(self) -> int | None:
        if time.monotonic() >= self._next_probe:
            self._next_probe = time.monotonic() + PROBE_MS / 1000
            self._probe()
        wait = PROBE_MS
        for _ in range(MAX_FRAMES_A_TURN):
            if not self._busy or (wait := self._send_some()):
                break
        return wait if self._peers.flush() else min(wait, RETRY_MS)

    def _send_some(self) -> int:
        """Sends one frame of one request. Returns how many milliseconds to wait before the next."""
        room = self._busy.popleft()
        if self._send_next(room):
            self._busy.appendleft(room)
            self._num_waiting = 0
        elif room.has_more:
            self._busy.append(room)
            self._num_waiting += 1
        if not self._busy:
            return PROBE_MS
        if self._num_waiting < len(self._busy):
            return 0
        self._num_waiting = 0  # whatever ends the wait, each is looked at again
        return RETRY_MS

    def _probe(self) -> None:
        for identity, why in self._peers.find_lost():
            self._lose(identity, f"Lost the connection to the decode server ({why}).")
        for early in self.rooms.overdue(self._contact_seconds, self._last_pass):
            reason = (
                f"The prefill server has not got the request within {self._contact_seconds:g} s: was it asked, "
                "and did it refuse?"
            )
            self._refuse_all(early.frame.room, reason)
        self.observer.has_peers(len(self._peers))

    def _lose(self, identity: bytes, reason: str) -> None:
        """Fails what a decode server that is gone had asked for, or was going to."""
        self._peers.forget(identity)
        for room in self.rooms.lose(identity, reason):
            self._fail(room, reason, Cause.LOST)

    def _put(self, room: SendRoom, frames: Callable[[], Frames], is_final: IsFinal = always) -> None:
        def enqueue() -> None:
            if not room.is_sending:
                return
            room.outbox.append(Parcel(frames(), is_final))
            if room not in self._busy:
                self._busy.append(room)

        self.call(enqueue)

    def _send_next(self, room: SendRoom) -> bool:
        """Sends one frame. False when there is none that is final, or the decode server is not keeping up."""
        frame = room.unsent or self._next_frame(room)
        room.unsent = None
        if not room.is_sending:
            room.clear()
        if frame is None or not room.is_sending:
            return False
        try:
            self._socket.send_multipart([room.identity, *frame], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            room.unsent = frame
            return False
        except zmq.ZMQError as error:
            self._lose(room.identity, f"Lost the connection to the decode server ({error}).")
            return False
        return True

    def _next_frame(self, room: SendRoom) -> list[Buffer] | None:
        try:
            return room.next_frame() if room.is_sending else None
        except Exception as error:
            logger.exception("KV transfer: could not read the pages of room %d", room.room)
            self._fail(room, f"The prefill server could not read the request's pages: {error!r}.", Cause.ERROR)
            self._peers.reply(room.identity, room.pack(Stop(room.reason[:2000])))
            return None

    def _blocks(self, room: SendRoom, pages: PageRange, ids: PageIdsLater, of_layers: range) -> Frames:
        pool, where = self._part_for(room), (of_layers, pages, ids())
        if self._peers.has_mapped(room.identity):
            yield from blocks.offered(room, pool, *where)
        elif (channel := self._peers.channel(room.identity)) and max(pool.item_lens) <= channel.slot_bytes:
            yield from blocks.held(room, pool.item_lens, *where, channel, self._part_of(room))
        else:
            yield from blocks.sent(room, pool, *where)

    def _serve_memory(self, memory: Memory) -> MemoryServer | None:
        try:
            return MemoryServer(str(Address(self._host, self.port)), memory, self._hear_reader)
        except OSError as error:
            logger.warning("KV transfer: no process of this machine can map this rank's pool: %s", error)
            return None

    def _hear_reader(self, identity: bytes) -> None:
        self.call(partial(self._peers.add_reader, identity))

    def _fetch(self, identity: bytes, frame: Frame) -> None:
        """Sends a block for which the other side waits: with what it has, if the request is gone."""
        channel = self._peers.channel(identity)
        if channel is None:
            raise WireError("FETCH without a channel")
        block, num_bytes = wire.parse_fetch(frame, channel.slot_bytes)
        room = self.rooms.find_asked(identity, frame)
        held = room.held.get(block) if room is not None else None
        if room is None or held is None:
            channel.send_nothing(num_bytes)
        elif held.num_bytes != num_bytes:
            raise WireError(f"FETCH: {num_bytes} bytes of a block of {held.num_bytes}")
        else:
            del room.held[block]
            held.send()

    def _lose_channel(self, identity: bytes, error: str) -> None:
        """Its requests fail; later ones go over ZMQ."""
        reason = f"The channel to the decode server does not work ({error})."
        for room in self.rooms.of(identity):
            if room.is_sending:
                self._peers.reply(identity, room.pack(Stop(reason[:2000])))
                self._fail(room, reason, Cause.ERROR)
        if self._peers.ends is not None:
            self._peers.ends.lose(identity)
        self._answer_join(identity, Join(reason=reason[:2000]))

    def _answer_join(self, identity: bytes, join: Join) -> None:
        self._peers.reply(identity, wire.pack_message(join, 0, 0))

    def _part_for(self, room: SendRoom) -> Pages:
        """This rank's pages, or only those heads of them that the decode rank's pages have."""
        return self._parts.of(self._part_of(room))

    def _part_of(self, room: SendRoom) -> range:
        return overlap(self._heads, range(*room.ask.heads) if room.ask else self._heads)

    def _receive_all(self) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            if (message := receive(self._socket, wire.MAX_PARTS + 1)) is None:
                return
            envelope, *parts = buffers(message)
            identity = bytes(envelope)
            if self.keys is not None and not self.keys.peers.allows(sender_key(message[0])):
                if self._peers.channel(identity) is not None:
                    self._lose_channel(identity, "its key has been revoked")
                self._peers.reply(
                    identity, wire.pack_message(Stop("This server's key has been revoked."), *wire.place_of(parts))
                )
                continue
            try:
                frame = wire.parse(parts)
                if frame.kind is Kind.PING:
                    self._peers.hear(identity)
                    continue
                self._dispatch(identity, frame)
                self._peers.add(identity)
            except wire.VersionError as error:
                reason = (
                    f"The decode server speaks wire version {error.version}, the prefill server "
                    f"{wire.VERSION}: install the same version of sglang-apb on both."
                )
                self._settle(Early.of(identity, error.frame, self.rooms.early_seconds, reason))
            except WireError as error:
                self.observer.refused_frame("a decode server", error)

    def _dispatch(self, identity: bytes, frame: Frame) -> None:
        if frame.kind is Kind.ASK:
            ask = wire.parse_message(frame, Ask)
            reason = find_difference(self._compat, ask.compat) or find_no_overlap(self._heads, range(*ask.heads))
            # What is kept must be small, whatever was sent: not the frame's body, nor lists that do not fit.
            kept = None if reason else msgspec.structs.replace(ask, compat=self._compat)
            self._settle(Early.of(identity, frame, self.rooms.early_seconds, reason, kept))
        elif frame.kind is Kind.EXPECT:
            self._settle(Early.of(identity, frame, self.rooms.early_seconds))
        elif frame.kind is Kind.STOP:
            self._settle(Early.of(identity, frame, self.rooms.early_seconds, wire.parse_message(frame, Stop).reason))
        elif frame.kind is Kind.DONE:
            self._complete(identity, frame)
        elif frame.kind is Kind.FETCH:
            self._fetch(identity, frame)
        elif frame.kind is Kind.JOIN:
            self._join(identity, wire.parse_message(frame, Join))
        else:
            raise WireError(f"{frame.kind.name} is not for a prefill server")

    def _join(self, identity: bytes, join: Join) -> None:
        if self._peers.ends is None:
            self._answer_join(identity, Join(reason="the prefill server's data_plane does not allow it"))
        else:
            self._peers.ends.join(identity, join)

    def _settle(self, early: Early) -> None:
        """Applies what a decode server says now, or keeps it until the room is opened here."""
        room, reason = self.rooms.settle(early)
        if room is not None:
            self._apply(room, early)
        elif reason and early.frame.kind in (Kind.ASK, Kind.EXPECT):
            self._refuse(early, reason)

    def _refuse(self, early: Early, reason: str) -> None:
        frame = early.frame
        stop = Stop(reason[:MAX_REASON_CHARS])
        self._peers.reply(early.identity, wire.pack_message(stop, frame.room, frame.attempt, frame.asker))

    def _apply(self, room: SendRoom, early: Early, was_early: bool = False) -> None:
        if early.frame.kind is Kind.EXPECT:
            if room.state is SendState.UNASKED and not room.identity:
                room.identity = early.identity
            return
        if early.frame.kind is Kind.STOP:
            is_theirs = room.identity in (b"", early.identity)
            unasked = room.state is SendState.UNASKED and is_theirs and (was_early or early.frame.attempt == 0)
            if unasked or (room.identity, room.attempt) == (early.identity, early.frame.attempt):
                self._fail(room, early.reason or "The decode server gave the request up.", early.cause)
            return
        if room.state is not SendState.UNASKED or room.closed or room.identity not in (b"", early.identity):
            self._refuse(early, room.reason or in_use(room.room))
            return
        room.identity, room.attempt, room.ask = early.identity, early.frame.attempt, early.ask
        if early.reason:
            self._fail(room, early.reason, Cause.MISFIT)
            self._peers.reply(room.identity, room.pack(Stop(early.reason)))
        else:
            room.state = SendState.ASKED

    def _complete(self, identity: bytes, frame: Frame) -> None:
        room = self.rooms.find_asked(identity, frame)
        if room is not None and room.state is SendState.ASKED:
            if room.is_offered:  # until here they were this request's: `close` comes before they are freed
                self._peers.reply(identity, wire.pack(Kind.KEPT, room.room, room.attempt, asker=room.asker))
            room.finished = time.monotonic()
            room.state = SendState.DONE
            self.observer.ended(room.room, room.num_bytes, room.num_hidden_bytes, room.seconds)

    def _drop(self, room: SendRoom, reason: str, cause: Cause) -> None:
        self.rooms.remove(room)
        room.clear()
        if room.state in (SendState.ASKED, SendState.UNASKED):
            self.observer.failed(room.room, cause, reason)
            if room.identity:
                self._peers.reply(room.identity, room.pack(Stop(reason[:2000])))
        if room.state in (SendState.UNASKED, SendState.FAILED):
            self.rooms.give_up(room, room.reason or reason)

    def _fail(self, room: SendRoom, reason: str, cause: Cause) -> None:
        if room.state in (SendState.ASKED, SendState.UNASKED):
            self.observer.failed(room.room, cause, reason)
            room.cause, room.reason = cause, reason
            room.state = SendState.FAILED
        room.clear()
