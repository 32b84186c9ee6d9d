"""Which decode servers are alive, as a prefill rank can tell: each has a connection for pings beside that for KV.

ZMQ's own thread pings over it (`loop.ask_for_heartbeats`), from PING_MS after it was made. Until then both endpoints'
threads do, so that a server that is stopped in its first second is noticed, too.
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass

from sglang_apb.transfer.loop import PING_MS, WATCH_MS

_SUFFIX = b" life"
_BY_ZMQ_S = 1.5 * PING_MS / 1000
_SILENCE_S = WATCH_MS / 1000
# A connection for pings is made together with one for KV. Alone, it is nobody's.
_ALONE_S = 60.0


def heartbeat_of(peer: bytes) -> bytes:
    """What the connection for pings is called beside the one for KV."""
    return peer + _SUFFIX


@dataclass
class _Heartbeat:
    made: float
    heard: float


class Heartbeats:
    """`hear` at each ping's arrival; one thread. Of at most `max_peers`.

    The first comes over the connection for pings; answers come over the one for KV.
    """

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._heartbeats: dict[bytes, _Heartbeat] = {}

    def hear(self, connection: bytes) -> None:
        peer, now = connection.removesuffix(_SUFFIX), time.monotonic()
        if peer in self._heartbeats:
            self._heartbeats[peer].heard = now
        elif peer != connection and len(self._heartbeats) < self._max_peers:
            self._heartbeats[peer] = _Heartbeat(now, now)

    def connections(self, peer: bytes) -> list[bytes]:
        """All of a peer's that have spoken: when one is gone, so is the peer."""
        return [peer, *([heartbeat_of(peer)] if peer in self._heartbeats else [])]

    def is_silent(self, peer: bytes) -> bool:
        """Whether a peer whose heartbeat is not watched by ZMQ yet has not answered for too long."""
        heartbeat = self._heartbeats.get(peer)
        if heartbeat is None or heartbeat.heard > heartbeat.made + _BY_ZMQ_S:
            return False
        return time.monotonic() - heartbeat.heard > _SILENCE_S

    def forget_strangers(self, peers: Container[bytes]) -> None:
        """Those who have never asked for anything, after a while."""
        now = time.monotonic()
        for peer, heartbeat in list(self._heartbeats.items()):
            if peer not in peers and now - heartbeat.made > _ALONE_S:
                del self._heartbeats[peer]

    def forget(self, peer: bytes) -> None:
        self._heartbeats.pop(peer, None)
