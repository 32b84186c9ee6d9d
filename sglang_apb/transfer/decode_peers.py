"""Prefill side: the decode ranks that are connected, by their ZMQ names, and how pages get to each."""

from __future__ import annotations

import zmq

from sglang_apb.transfer import wire
from sglang_apb.transfer.exchange import PrefillEnds, SendingChannel
from sglang_apb.transfer.lives import Lives
from sglang_apb.transfer.wire import Kind

MAX_PEERS = 4096
_PING = wire.pack(Kind.PING, 0, 0)


class DecodePeers:
    """`socket` is the ROUTER to which they connect. Everything is its thread's."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self._names: set[bytes] = set()
        self._readers: set[bytes] = set()
        self._lives = Lives(MAX_PEERS)
        self.ends: PrefillEnds | None = None

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: bytes) -> None:
        if len(self._names) < MAX_PEERS:
            self._names.add(name)

    def add_reader(self, name: bytes) -> None:
        """It has mapped this rank's pool."""
        if len(self._readers) < MAX_PEERS:
            self._readers.add(name)

    def has_mapped(self, name: bytes) -> bool:
        return name in self._readers

    def channel(self, name: bytes) -> SendingChannel | None:
        return self.ends.channel(name) if self.ends is not None else None

    def hear(self, connection: bytes) -> None:
        """A ping."""
        self._lives.hear(connection)

    def forget(self, name: bytes) -> None:
        self._names.discard(name)
        self._readers.discard(name)
        self._lives.forget(name)
        if self.ends is not None:
            self.ends.lose(name)

    def find_lost(self) -> list[tuple[bytes, str]]:
        """Those whose connection is gone, and why: ZMQ tells only one who sends."""
        lost = [(name, why) for name in self._names if (why := self._why_lost(name))]
        self._lives.forget_strangers(self._names)
        return lost

    def _why_lost(self, name: bytes) -> str:
        if self._lives.is_silent(name):
            return "it does not answer"
        for connection in self._lives.connections(name):
            try:
                self._socket.send_multipart([connection, *_PING], zmq.NOBLOCK)
            except zmq.Again:
                continue  # there, and busy with what was sent before
            except zmq.ZMQError as error:
                return str(error)
        return ""
