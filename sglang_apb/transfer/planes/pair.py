"""Which plane serves a pair of ranks: the first of those that `data_plane` allows that works, on the decode side."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.planes.base import OpenReceive
from sglang_apb.transfer.planes.zmq import ZmqReceive
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, Buffer, Frame, WireError

logger = logging.getLogger(__name__)

# Takes a block that has come over a plane, and what brings it to its pages: None if it is there. For any thread.
Place = Callable[[DecodeRequest, int, Block, int, Callable[[], None] | None], None]


@dataclass(frozen=True)
class ReceivePlanes:
    """In the order in which they are tried; without `zmq_too` one of them has to work."""

    halves: tuple[OpenReceive, ...] = ()
    zmq_too: bool = True


ZMQ_ONLY = ReceivePlanes()


@dataclass
class Pair:
    """This rank and the prefill rank at `address`, for which it is called `identity`: the `ReceiveSide` of its planes.

    Until one of them is ready, KV comes over ZMQ. Everything but `place` is the endpoint's thread's, in which `call`
    runs a command.
    """

    planes: ReceivePlanes
    address: str
    identity: bytes
    call: Callable[[Callable[[], None]], None]
    send: Callable[[list[Buffer]], None]
    place: Place
    fail: Callable[[DecodeRequest, str], None]
    lose: Callable[[str], None]

    def __post_init__(self) -> None:
        self._is_closed = False
        self.halves = [make(self) for make in self.planes.halves]
        self._untried = list(self.halves)
        zmq = ZmqReceive()
        self._by_kind = {kind: half for half in (*self.halves, zmq) for kind in half.kinds}
        self._by_pair_kind = {kind: half for half in self.halves for kind in half.pair_kinds}
        self._try_next()

    def speaks(self, frame: Frame) -> bool:
        """Whether a frame is a plane's that belongs to no request."""
        return frame.kind in self._by_pair_kind

    def hear(self, frame: Frame) -> None:
        self._by_pair_kind[frame.kind].hear(frame)

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        half = self._by_kind.get(frame.kind)
        if half is None:
            raise WireError(f"{wire.name_of(frame.kind)} is not for a decode server")
        half.take(request, rank, frame)

    def check(self) -> bool:
        """Whether something is coming, which is looked after; it must not take too long."""
        are_busy = [half.check() for half in self.halves]
        return any(are_busy)

    def end_if_stuck(self, request: DecodeRequest, seconds: float) -> None:
        for half in self.halves:
            half.end_if_stuck(request, seconds)

    def close(self) -> None:
        self._is_closed = True
        for half in self.halves:
            half.close()

    def give_up(self, reason: str) -> None:
        if self._is_closed:
            return
        if self._untried:
            self._try_next()
        elif self.planes.zmq_too:
            logger.info("KV transfer: KV comes over zmq. %s", reason)
        else:
            self.lose(reason)

    def _try_next(self) -> None:
        if self._untried:
            self._untried.pop(0).open()
