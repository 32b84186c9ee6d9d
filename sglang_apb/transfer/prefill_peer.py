"""Decode side: a prefill rank that is connected, and how its pages get here."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from functools import partial

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_apb.transfer import wire
from sglang_apb.transfer.fetcher import Place
from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.inbox import ReceiveRoom
from sglang_apb.transfer.lives import life_of
from sglang_apb.transfer.loop import SocketLoop, ask_for_life, buffers, guard, receive
from sglang_apb.transfer.ways import Way, Ways
from sglang_apb.transfer.wire import Buffer, Kind, WireError

RECEIVE_HIGH_WATER_MARK = 8
# Of one rank, before others are looked at.
MAX_FRAMES_A_TURN = 16
_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_PING = wire.pack(Kind.PING, 0, 0)


class PrefillPeer:
    """The rank at `address`, to which `send` sends a frame. `receive_some` is called when frames of it are there,
    `lose` with the reason when it is gone. Everything is the loop's thread's, but `place` (see `ways.Way`).

    Nothing is sent over the second connection but one ping, and ZMQ's own: see `loop.ask_for_life`.
    """

    def __init__(
        self,
        loop: SocketLoop,
        address: Address,
        max_bytes: int,
        ways: Ways,
        *,
        send: Callable[[list[Buffer]], None],
        receive_some: Callable[[PrefillPeer], None],
        place: Place,
        fail: Callable[[ReceiveRoom, str], None],
        lose: Callable[[str], None],
    ):
        self.address = address
        self._loop, self._max_bytes, self._lose = loop, max_bytes, lose
        identity = b"\1" + secrets.token_bytes(16)  # 0 in front is ZMQ's own
        self.socket, self._life = self._dealer(identity), self._dealer(life_of(identity))
        self.socket.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        ask_for_life(self._life)
        self._monitors = [each.get_monitor_socket(_LOST) for each in (self.socket, self._life)]
        self.way = Way(ways, str(address), identity, loop.call, send, place, fail, lose)
        loop.watch(self.socket, partial(receive_some, self))
        loop.watch(self._life, self._answer_pings)
        for monitor in self._monitors:
            loop.watch(monitor, partial(self._hear, monitor))
        for each in (self.socket, self._life):
            each.connect(f"tcp://{address}")
        self._life.send_multipart(_PING, zmq.NOBLOCK)

    def close(self) -> None:
        self.way.close()
        for each, monitor in zip((self.socket, self._life), self._monitors, strict=True):
            each.disable_monitor()
            self._loop.forget(monitor)
            self._loop.forget(each)

    def _dealer(self, identity: bytes) -> zmq.Socket:
        socket = self._loop.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.setsockopt(zmq.IPV6, int(":" in self.address.host))
        socket.setsockopt(zmq.LINGER, 0)
        guard(socket, self._max_bytes)
        if self._loop.keys is not None and self.address.key:
            self._loop.keys.speak_to(socket, self.address.key)
        return socket

    def _answer_pings(self) -> None:
        """Over the connection for KV: whatever comes over the other one ends ZMQ's watch there until its next ping."""
        for _ in range(MAX_FRAMES_A_TURN):
            if self._life.closed or (parts := receive(self._life)) is None:
                return
            with contextlib.suppress(WireError, zmq.ZMQError):  # gone: its monitor says so
                if wire.parse(buffers(parts)).kind is Kind.PING:
                    self.socket.send_multipart(_PING, zmq.NOBLOCK)

    def _hear(self, monitor: zmq.Socket) -> None:
        event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._lose(f"Prefill rank {self.address} does not have this server's key among its peers.")
        else:
            self._lose(f"Lost the connection to prefill rank {self.address}.")
