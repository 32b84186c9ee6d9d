"""Why a request failed on another rank of this server. SGLang's ranks agree that one has failed, but not on why, and
the first of them answers the client.
"""

from __future__ import annotations

import contextlib

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sglang_apb.transfer.observer import Cause, Failure

# Those of more requests are not kept: a rank asks for one as soon as it hears that the request has failed.
_NUM_KEPT = 64


class Reasons:
    """What one rank tells before the ranks agree, all others find afterwards. None: there are no others."""

    def __init__(self, store: dist.Store | None):
        self._store = store

    @classmethod
    def of_this_server(cls) -> Reasons:
        """Through the store by which the ranks have found each other."""
        has_others = dist.is_initialized() and dist.get_world_size() > 1
        return cls(_get_default_store() if has_others else None)

    def tell(self, room: int, failure: Failure) -> None:
        if self._store is None:
            return
        with contextlib.suppress(Exception):  # a store that is gone must not end SGLang's scheduler
            self._store.set(_key(room), f"{room} {failure.cause.name} {failure.reason}")
            self._store.check([_key(room)])  # answered when it is there: `set` itself does not wait

    def find(self, room: int) -> Failure | None:
        """None when no rank has told."""
        if self._store is None:
            return None
        with contextlib.suppress(Exception):
            if self._store.check([_key(room)]):
                of, cause, reason = self._store.get(_key(room)).decode().split(" ", 2)
                return Failure(reason, Cause[cause]) if of == str(room) else None
        return None


def _key(room: int) -> str:
    return f"sglang_apb/failed/{room % _NUM_KEPT}"
