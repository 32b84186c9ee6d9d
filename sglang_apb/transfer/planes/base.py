"""What a data plane is: two halves, which bring a request's pages from a prefill rank's pool to a decode rank's.

    prefill rank: one SendHalf for all decode ranks      decode rank: a ReceiveHalf for each prefill rank
      serves     whether pages can go to that one          open      makes the way ready, in its own time
      frames     bring a part of a request's pages,        take      a frame of the plane's kinds: brings its pages
                 or say that it can be had                           to their places, now or later
      take       a frame of the plane's kinds

Each half keeps for itself what it has to know of a request. What all planes have in common is in `Transfer` (prefill)
and in `DecodeRequest`: blocks that are `pending`, ranks that are `unconfirmed`, and what may still come to its pages.

A module of a plane has two functions, which `choice.py` calls when a server starts. Both take its Pool and its
TransferConfig, raise ValueError when the configuration names the plane and it is not possible here, and give None when
the plane is not to be used:

    send_half(pool, config)     -> OpenSend, which makes a rank's half
    receive_half(pool, config)  -> OpenReceive, which makes a half for each prefill rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.memory.gpu_pages import CudaPages
from sglang_apb.transfer.memory.pages import HostPages, Pages, plan_blocks
from sglang_apb.transfer.planes.table import AUTO, ZMQ
from sglang_apb.transfer.prefill.transfer import Frames, Transfer
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.config import OPTION
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.wire import Block, Buffer, Frame, PageIds


@dataclass(frozen=True)
class Pool:
    """A rank's KV pool: `pages` of the model's KV `heads`, of `page_size` tokens each."""

    pages: HostPages | CudaPages
    heads: range
    page_size: int


@dataclass(frozen=True)
class Part:
    """What a plane is to bring: pages [start, end) of a request, in `buffers`, of the KV `heads`.

    They are pages `ids` of `pages`, which are of these heads alone.
    """

    pages_of_request: PageRange
    buffers: range
    heads: range
    ids: PageIds
    pages: Pages

    def blocks(self, most_bytes: int) -> Iterator[tuple[Block, PageIds]]:
        """Of at most so many bytes each, or of one page, with where its pages are."""
        first, end = self.pages_of_request
        for block in plan_blocks(self.pages.item_lens, self.buffers, first, end - first, most_bytes):
            start = block.first_page - first
            yield block, self.ids[start : start + block.num_pages]

    def num_bytes(self, block: Block) -> int:
        return wire.block_bytes(block, self.pages.item_lens)


class SendSide(Protocol):
    """A prefill rank's endpoint, as its planes see it. Everything but `call` is its thread's."""

    @property
    def address(self) -> str:
        """By which decode ranks know this rank: HOST:PORT."""
        ...

    def call(self, command: Callable[[], None]) -> None:
        """Runs `command` in the endpoint's thread. For any thread."""
        ...

    def reply(self, peer: bytes, frame: list[Buffer]) -> None: ...

    def find_asked(self, peer: bytes, frame: Frame) -> Transfer | None:
        """That of which a frame speaks, if it is open and this decode rank has asked for it."""
        ...

    def fail_all(self, peer: bytes, reason: str) -> None:
        """Fails all that is sent to a decode rank, on both sides."""
        ...


class SendHalf:
    """A prefill rank's half of a plane. Everything is the endpoint's thread's."""

    kinds: tuple[int, ...] = ()

    def serves(self, peer: bytes, item_lens: Sequence[int]) -> bool:
        """Whether pages with `item_lens` bytes in each buffer can go to a decode rank by this plane, now."""
        raise NotImplementedError

    def frames(self, transfer: Transfer, part: Part) -> Frames:
        """Those that bring `part`, or say that it can be had; counts its bytes as sent."""
        raise NotImplementedError

    def take(self, peer: bytes, frame: Frame) -> None:
        """One of the plane's `kinds`. Raises WireError when it is wrong."""

    def is_read(self, transfer: Transfer) -> bool:
        """Whether nothing reads the request's pages any more, so that END may follow."""
        return True

    def confirm(self, transfer: Transfer) -> None:
        """The decode rank has everything, and the request's pages are still its own."""

    def drop(self, transfer: Transfer) -> None:
        """It has ended. Also for one that this half does not know."""

    def lose(self, peer: bytes) -> None:
        """A decode rank is gone. Also for one that this half does not know."""

    def shut_out(self, peer: bytes) -> None:
        """A decode rank's key has been revoked, and it is still connected."""

    def stop(self) -> None:
        """For tests."""


class ReceiveSide(Protocol):
    """A decode rank's endpoint, as it stands to the prefill rank at `address`, for which it is called `identity`."""

    address: str
    identity: bytes

    def call(self, command: Callable[[], None]) -> None:
        """Runs `command` in the endpoint's thread. For any thread; all else but `place` is the endpoint's thread's."""
        ...

    def send(self, frame: list[Buffer]) -> None: ...

    def give_up(self, reason: str) -> None:
        """This half cannot be opened, or does not work any more: the next plane is tried, or there is none."""
        ...

    def fail(self, request: DecodeRequest, reason: str) -> None: ...

    def lose(self, reason: str) -> None:
        """Fails all requests of the prefill rank, and connects again at the next."""
        ...

    def place(
        self, request: DecodeRequest, rank: int, block: Block, num_bytes: int, write: Callable[[], None] | None
    ) -> None:
        """A `pending` block has come; `write` brings it to its pages, if it is not there. For any thread."""
        ...


class ReceiveHalf:
    """A decode rank's half of a plane, towards one prefill rank. Everything is the endpoint's thread's.

    `kinds` are of frames that belong to a request, `pair_kinds` of those that do not.
    """

    kinds: tuple[int, ...] = ()
    pair_kinds: tuple[int, ...] = ()

    def open(self) -> None:
        """Begins to make the way ready. When it is, the plane says so to its other half, in frames of its own; when it
        cannot be, to the side (`give_up`).
        """

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        """One of the plane's `kinds`, under the request's lock. Raises WireError when it is wrong, TransferError when
        the request cannot become complete any more.
        """

    def hear(self, frame: Frame) -> None:
        """One of the plane's `pair_kinds`. Raises WireError when it is wrong."""

    def check(self) -> bool:
        """Whether something is on its way, which must not take too long."""
        return False

    def end_if_stuck(self, request: DecodeRequest, seconds: float) -> None:
        """Ends what is on its way to a request that has ended, if nothing has come for so long."""

    def close(self) -> None:
        """The prefill rank is gone."""


OpenSend: TypeAlias = Callable[[SendSide], SendHalf]
OpenReceive: TypeAlias = Callable[[ReceiveSide], ReceiveHalf]


def impossible(plane: str, reason: str) -> ValueError:
    """What a server says that is to use `plane` and cannot."""
    return ValueError(f"data_plane {plane!r} of {OPTION} is not possible here ({reason}): use {AUTO!r} or {ZMQ!r}.")
