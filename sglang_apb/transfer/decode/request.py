"""One request on a decode rank: what it waits for, what has come, and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from sglang_apb.transfer.decode.assembly import Assembly, TransferError
from sglang_apb.transfer.memory.pages import Pages
from sglang_apb.transfer.observer import Cause, Observer
from sglang_apb.transfer.planes.table import ZMQ
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.wire import Announce, Block, End, Frame, Kind, PageIds, Stop, WireError

TakeBlock = Callable[["DecodeRequest", int, Frame], None]


class RequestState(Enum):
    RECEIVING = "waiting for KV"
    COMPLETE = "every byte of every rank and the first token are there"
    FAILED = "failed"


@dataclass(eq=False)
class DecodeRequest:
    """`ranks[i]` is the address of prefill rank i, `pages` the pool's pages that the request gets, and `sources[i]` the
    heads `parts[i]` of them that rank i brings. Its first-token record goes to row `aux_index` of `aux`.

    `lock` is held for every write of this process into the pool: once `closed` is set under it, and nothing
    `is_arriving` from elsewhere, the pages may be freed. `pending` are blocks that were spoken of and have not come:
    while there are any, what comes after them is `held_back`. `unconfirmed` are ranks that have to say that what was
    read of them had not changed.
    """

    room: int
    attempt: int
    ranks: tuple[Address, ...]
    pages: PageIds
    aux: Pages
    aux_index: int
    assembly: Assembly
    sources: tuple[Pages, ...]
    parts: tuple[range, ...]
    observer: Observer
    asker: int = 0
    state: RequestState = RequestState.RECEIVING
    reason: str = ""
    cause: Cause = Cause.GIVEN_UP
    closed: bool = False
    lost_rank: bool = False
    data_plane: str = ZMQ
    unconfirmed: set[int] = field(default_factory=set)
    pending: set[tuple[int, Block]] = field(default_factory=set)
    held_back: list[tuple[Address, Frame]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: float = 0.0
    finished: float = 0.0
    _has_told: bool = False
    _num_arriving: int = 0
    _arrivals: threading.Condition = field(default_factory=threading.Condition)

    @property
    def seconds(self) -> float:
        """From the first byte to the last."""
        return max(0.0, self.finished - self.started) if self.started else 0.0

    @property
    def is_receiving(self) -> bool:
        return not self.closed and self.state is RequestState.RECEIVING

    def ids_of(self, block: Block) -> PageIds:
        """Where its pages are in the pool."""
        return self.pages[block.first_page : block.first_page + block.num_pages]

    def begin_arrival(self) -> bool:
        """Before something else than this process may write into the pages. False when nothing may any more."""
        with self._arrivals:
            if not self.is_receiving:
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

    # Everything from here on is called under `lock`.

    def take(self, rank: int, frame: Frame, take_block: TakeBlock) -> bool:
        """A frame of `rank`, which `take_block` knows if it is a data plane's. Whether DONE is to be sent now.

        Raises WireError when it is wrong.
        """
        try:
            self._take(rank, frame, take_block)
        except TransferError as error:
            self.fail(str(error), Cause.PEER if frame.kind is Kind.STOP else Cause.INCOMPLETE)
            return False
        if not self.assembly.complete:
            return False
        if not self.unconfirmed:
            self._finish()
        is_first, self._has_told = not self._has_told, True
        return is_first

    def hold_back(self, address: Address, frame: Frame) -> bool:
        """Whether a frame has to wait for blocks that were spoken of before it."""
        if frame.kind not in (Kind.AUX, Kind.END) or not (self.pending or self.held_back):
            return False
        if len(self.held_back) >= 2 * len(self.ranks):
            raise WireError(f"{wire.name_of(frame.kind)} again, while blocks are on their way")
        self.held_back.append((address, frame))
        return True

    def check_block(self, rank: int, block: Block) -> None:
        """Before a data plane brings it. Raises WireError unless it is new and inside what the rank announced."""
        self.started = self.started or time.monotonic()
        self.assembly.check_block(rank, block)

    def wait_for(self, rank: int, block: Block, at_most: int) -> None:
        """A block that will come later. Raises WireError when `at_most` of that rank are waited for already."""
        if (rank, block) in self.pending:
            raise WireError(f"rank {rank} has {block} ready twice")
        if sum(of == rank for of, _ in self.pending) >= at_most:
            raise WireError(f"rank {rank} has more blocks ready than it has slots")
        self.pending.add((rank, block))

    def place(self, rank: int, block: Block, num_bytes: int, write: Callable[[], None] | None) -> None:
        """It has come, and `write` brings it to its pages."""
        self.pending.discard((rank, block))
        if not self.is_receiving:
            return
        try:
            self.assembly.check_block(rank, block)
            if write is not None:
                write()
        except Exception as error:  # whatever it was: the rest of the request waits for this block
            self.fail(f"A block of prefill rank {rank} could not be placed: {error}.", Cause.ERROR)
            return
        self.assembly.add_block(rank, block, num_bytes)

    def confirm(self, rank: int) -> None:
        """What was read of it had not changed. Raises WireError when there is nothing to confirm."""
        if not self.assembly.complete or rank not in self.unconfirmed:
            raise WireError(f"rank {rank} confirmed pages that were not read where they lie")
        self.unconfirmed.remove(rank)

    def fail(self, reason: str, cause: Cause) -> None:
        if self.state is RequestState.RECEIVING:
            self.observer.failed(self.room, cause, reason)
            self.cause, self.reason = cause, reason
            self.state = RequestState.FAILED

    def _take(self, rank: int, frame: Frame, take_block: TakeBlock) -> None:
        if frame.kind is Kind.ANNOUNCE:
            self.assembly.announce(rank, wire.parse_message(frame, Announce))
        elif frame.kind is Kind.AUX:
            self._take_aux(rank, frame)
        elif frame.kind is Kind.END:
            self.assembly.end(rank, wire.parse_message(frame, End))
        elif frame.kind is Kind.STOP:
            raise TransferError(wire.parse_message(frame, Stop).reason)
        else:
            take_block(self, rank, frame)

    def _take_aux(self, rank: int, frame: Frame) -> None:
        payload, expected = frame.payload or b"", sum(self.aux.item_lens)
        if len(payload) != expected:
            raise WireError(f"AUX: payload of {len(payload)} bytes, a first-token record has {expected}")
        self.assembly.add_aux(rank, bytes(payload))

    def _finish(self) -> None:
        # Only now: until then SGLang sees the row as not written.
        row = np.array([self.aux_index], np.int64)
        self.aux.scatter(0, len(self.aux.item_lens), row, self.assembly.aux or b"")
        self.finished = time.monotonic()
        self.state = RequestState.COMPLETE
        self.observer.ended(self.room, self.assembly.num_bytes, self.assembly.num_hidden_bytes, self.seconds)
