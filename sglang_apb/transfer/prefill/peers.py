"""The decode ranks that are connected to a prefill rank, by their ZMQ names."""

from __future__ import annotations

import logging
from collections import deque

import zmq

from sglang_apb.transfer.heartbeats import Heartbeats
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Buffer, Kind

logger = logging.getLogger(__name__)

MAX_PEERS = 4096
MAX_UNSENT = 1 << 14
_PING = wire.pack(Kind.PING, 0, 0)


class DecodePeers:
    """`socket` is the ROUTER to which they connect. Everything is its thread's."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self._names: set[bytes] = set()
        self._heartbeats = Heartbeats(MAX_PEERS)
        self._unsent: dict[bytes, deque[list[Buffer]]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: bytes) -> None:
        if len(self._names) < MAX_PEERS:
            self._names.add(name)

    def hear(self, connection: bytes) -> None:
        """A ping."""
        self._heartbeats.hear(connection)

    def reply(self, name: bytes, frame: list[Buffer]) -> None:
        """Sends a frame now or, when so much waits for that rank that ZMQ takes no more, at a later `flush`."""
        if name not in self._unsent and self._send(name, frame):
            return
        if sum(map(len, self._unsent.values())) < MAX_UNSENT:
            self._unsent.setdefault(name, deque()).append(frame)
        else:
            logger.warning("KV transfer: dropped a reply: %d wait for decode servers that do not read", MAX_UNSENT)

    def flush(self) -> bool:
        """Whether no reply waits any more."""
        for name, frames in list(self._unsent.items()):
            while frames and self._send(name, frames[0]):
                frames.popleft()
            if not frames:
                del self._unsent[name]
        return not self._unsent

    def _send(self, name: bytes, frame: list[Buffer]) -> bool:
        """Whether there is no need to try again."""
        try:
            self._socket.send_multipart([name, *frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            logger.debug("KV transfer: a decode server did not take a reply: %s", error)
        return True

    def forget(self, name: bytes) -> None:
        self._unsent.pop(name, None)
        self._names.discard(name)
        self._heartbeats.forget(name)

    def find_lost(self) -> list[tuple[bytes, str]]:
        """Those whose connection is gone, and why: ZMQ tells only one who sends."""
        lost = [(name, why) for name in self._names if (why := self._why_lost(name))]
        self._heartbeats.forget_strangers(self._names)
        return lost

    def _why_lost(self, name: bytes) -> str:
        if self._heartbeats.is_silent(name):
            return "it does not answer"
        for connection in self._heartbeats.connections(name):
            try:
                self._socket.send_multipart([connection, *_PING], zmq.NOBLOCK)
            except zmq.Again:
                continue  # there, and busy with what was sent before
            except zmq.ZMQError as error:
                return str(error)
        return ""
