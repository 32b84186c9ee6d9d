"""A prefill rank that a decode rank is connected to."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from functools import partial

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.heartbeats import heartbeat_of
from sglang_apb.transfer.loop import SocketLoop, ask_for_heartbeats, buffers, guard, receive
from sglang_apb.transfer.planes.pair import Pair, Place, ReceivePlanes
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.wire import Buffer, Kind, WireError

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
    """The rank at `address`. `receive_some` is called when frames of it are there, `lose` with the reason when it is
    gone. Everything is the loop's thread's.

    Nothing is sent over the second connection but one ping, and ZMQ's own: see `loop.ask_for_heartbeats`.
    """

    pair: Pair

    def __init__(
        self,
        loop: SocketLoop,
        address: Address,
        max_bytes: int,
        receive_some: Callable[[PrefillPeer], None],
        lose: Callable[[str], None],
    ):
        self.address = address
        self._loop, self._max_bytes, self._lose = loop, max_bytes, lose
        self._identity = b"\1" + secrets.token_bytes(16)  # 0 in front is ZMQ's own
        self.socket, self._heartbeat = self._dealer(self._identity), self._dealer(heartbeat_of(self._identity))
        self.socket.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        ask_for_heartbeats(self._heartbeat)
        self._monitors = [each.get_monitor_socket(_LOST) for each in (self.socket, self._heartbeat)]
        loop.watch(self.socket, partial(receive_some, self))
        loop.watch(self._heartbeat, self._answer_pings)
        for monitor in self._monitors:
            loop.watch(monitor, partial(self._hear, monitor))

    def connect(
        self,
        planes: ReceivePlanes,
        send: Callable[[list[Buffer]], None],
        place: Place,
        fail: Callable[[DecodeRequest, str], None],
    ) -> None:
        """`planes` bring its pages; what they need for that is described at `Pair`."""
        for each in (self.socket, self._heartbeat):
            each.connect(f"tcp://{self.address}")
        self._heartbeat.send_multipart(_PING, zmq.NOBLOCK)
        self.pair = Pair(planes, str(self.address), self._identity, self._loop.call, send, place, fail, self._lose)

    def close(self) -> None:
        self.pair.close()
        for each, monitor in zip((self.socket, self._heartbeat), self._monitors, strict=True):
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
            if self._heartbeat.closed or (parts := receive(self._heartbeat)) is None:
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
