"""Which decode servers are alive, as a prefill rank can tell: each has a connection for pings beside that for KV.

ZMQ's own thread pings over it (`loop.ask_for_life`), from PING_MS after it was made. Until then both sides' transfer
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


def life_of(identity: bytes) -> bytes:
    """What the connection for pings is called beside the one for KV."""
    return identity + _SUFFIX


@dataclass
class _Life:
    made: float
    heard: float


class Lives:
    """`hear` at each ping's arrival; one thread. Of at most `max_peers`.

    The first comes over the connection for pings; answers come over the one for KV.
    """

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._lives: dict[bytes, _Life] = {}

    def hear(self, connection: bytes) -> None:
        identity, now = connection.removesuffix(_SUFFIX), time.monotonic()
        if identity in self._lives:
            self._lives[identity].heard = now
        elif identity != connection and len(self._lives) < self._max_peers:
            self._lives[identity] = _Life(now, now)

    def connections(self, identity: bytes) -> list[bytes]:
        """All of a peer's that have spoken: when one is gone, so is the peer."""
        return [identity, *([life_of(identity)] if identity in self._lives else [])]

    def is_silent(self, identity: bytes) -> bool:
        """Whether a peer whose life is not watched by ZMQ yet has not answered for too long."""
        life = self._lives.get(identity)
        if life is None or life.heard > life.made + _BY_ZMQ_S:
            return False
        return time.monotonic() - life.heard > _SILENCE_S

    def forget_strangers(self, peers: Container[bytes]) -> None:
        """Those who have never asked for anything, after a while."""
        now = time.monotonic()
        for identity, life in list(self._lives.items()):
            if identity not in peers and now - life.made > _ALONE_S:
                del self._lives[identity]

    def forget(self, identity: bytes) -> None:
        self._lives.pop(identity, None)
