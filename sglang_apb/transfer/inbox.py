"""Decode side: one request's transfer, as far as it has come."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from sglang_apb.transfer.assembly import Assembly
from sglang_apb.transfer.config import ZMQ
from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.observer import Cause
from sglang_apb.transfer.pages import Pages
from sglang_apb.transfer.wire import Block, Frame, PageIds, WireError

if TYPE_CHECKING:
    from sglang_apb.transfer.prefill_peer import PrefillPeer


class ReceiveState(Enum):
    RECEIVING = "waiting for KV"
    COMPLETE = "every byte of every rank and the first token are there"
    FAILED = "failed"


@dataclass(eq=False)
class ReceiveRoom:
    """One request's transfer. `ranks[i]` is the address of prefill rank i, `pages` the pool's pages it gets, and
    `sources[i]` the heads `parts[i]` of them that rank i brings.

    `lock` is held for every write of this process into the pool: once `closed` is set under it, and nothing
    `is_arriving` from elsewhere, the pages may be freed. `unconfirmed` are ranks whose pages were read where they lie:
    each has to say that they had not changed. While blocks are on their way over a channel, what comes after them is
    `held_back`.
    """

    room: int
    attempt: int
    ranks: tuple[Address, ...]
    pages: PageIds
    aux_index: int
    assembly: Assembly
    sources: tuple[Pages, ...]
    parts: tuple[range, ...]
    asker: int = 0
    state: ReceiveState = ReceiveState.RECEIVING
    reason: str = ""
    cause: Cause = Cause.GIVEN_UP
    closed: bool = False
    lost_rank: bool = False
    data_plane: str = ZMQ
    unconfirmed: set[int] = field(default_factory=set)
    fetching: set[tuple[int, Block]] = field(default_factory=set)
    held_back: list[tuple[PrefillPeer, Frame]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: float = 0.0
    finished: float = 0.0
    _num_arriving: int = 0
    _arrivals: threading.Condition = field(default_factory=threading.Condition)

    def begin_arrival(self) -> bool:
        """Before something else than this process may write into the pages. False when nothing may any more."""
        with self._arrivals:
            if self.closed or self.state is not ReceiveState.RECEIVING:
                return False
            self._num_arriving += 1
            return True

    def end_arrival(self) -> None:
        with self._arrivals:
            self._num_arriving -= 1
            self._arrivals.notify_all()

    @property
    def is_arriving(self) -> bool:
        """Whether something may still be written into the pages although `closed` has been set."""
        return bool(self._num_arriving)

    def wait_for_arrivals(self, seconds: float) -> bool:
        """After `closed` has been set: until nothing arrives in the pages. False if something still does."""
        with self._arrivals:
            return self._arrivals.wait_for(lambda: not self._num_arriving, seconds)

    @property
    def seconds(self) -> float:
        """From the first byte to the last."""
        return max(0.0, self.finished - self.started) if self.started else 0.0

    def confirm(self, rank: int) -> None:
        """Raises WireError when there is nothing to confirm."""
        if not self.assembly.complete or rank not in self.unconfirmed:
            raise WireError(f"rank {rank} confirmed pages that were not read where they lie")
        self.unconfirmed.remove(rank)
