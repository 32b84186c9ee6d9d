"""SGLang's bootstrap room: the number by which both servers know a request, chosen by a router or a client."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

# As `patches/request_checks.py` lets through. In SGLang's first-token record 0 means that nothing is there yet.
ROOMS = range(1, 1 << 63)


class RoomKey(int):
    """A room's number, as one request's key in SGLang's dictionaries. Another request with the same number has another
    key: whatever becomes of it, it neither sees nor clears what is kept of this one.
    """

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def of(cls, room: object) -> RoomKey:
        """0 for what is no room's number."""
        return cls(room if _is_room(room) else 0)  # type: ignore[call-overload,no-any-return]


def why_no_room(room: object) -> str:
    """Empty if it is a room's number."""
    return "" if _is_room(room) else f"bootstrap_room={room!r:.80} must be a whole number from 1 to 2^63 - 1."


def _is_room(room: object) -> bool:
    return isinstance(room, int) and not isinstance(room, bool) and int(room) in ROOMS


def in_use(room: int) -> str:
    return f"Bootstrap room {room} is in use: every request needs its own."


def digest_of(token_ids: Sequence[int]) -> bytes:
    """Of a prompt: two servers that have it for one room have the same request there."""
    return xxhash.xxh3_128_digest(np.asarray(token_ids, np.int64).tobytes())
