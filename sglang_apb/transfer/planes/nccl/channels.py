"""What both halves of `nccl` agree on, and what a channel between them is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, Buffer, ByteCount, Frame, Kind, PageIds, WireError

NAME = "nccl"
# Of each side. While one block is sent, one is copied on either side, and one asked for.
NUM_SLOTS = 4
# What a setting may ask for is not less.
MIN_SLOT_BYTES = 4 << 20
_FETCHED = struct.Struct("!Q")


class ChannelError(RuntimeError):
    """A channel does not work, or not any more."""


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either way: `gpu` of the side that asks, `slot_bytes` that a block has at most, the channel's id, or why there is
    none.
    """

    gpu: Annotated[str, Meta(max_length=128)] = ""
    slot_bytes: ByteCount = 0
    unique_id: Annotated[bytes, Meta(max_length=128)] = b""
    reason: Annotated[str, Meta(max_length=2000)] = ""

    def pack(self) -> list[Buffer]:
        return wire.pack(Kind.JOIN, 0, 0, msgspec.msgpack.encode(self))

    @classmethod
    def parse(cls, frame: Frame) -> Join:
        """Raises WireError."""
        return wire.decode_body(frame, _join_decoder)


_join_decoder = msgspec.msgpack.Decoder(Join)


def pack_fetch(block: Block, num_bytes: int) -> bytes:
    """The body of a FETCH: what to send, and how much the channel waits for."""
    return block.pack() + _FETCHED.pack(num_bytes)


def parse_fetch(frame: Frame, max_bytes: int) -> tuple[Block, int]:
    """The block of a FETCH frame, and its bytes. Raises WireError when they are more than `max_bytes`."""
    block, rest = Block.unpack(frame.body)
    if len(rest) != _FETCHED.size:
        raise WireError(f"FETCH: body of {len(frame.body)} bytes")
    (num_bytes,) = _FETCHED.unpack(rest)
    if not 0 < num_bytes <= max_bytes:
        raise WireError(f"FETCH: {num_bytes} bytes, at most {max_bytes}")
    return block, num_bytes


class Held(Protocol):
    """A block that a prefill rank holds until it is fetched: `send` or `drop` ends that."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def needs_no_pages(self) -> bool:
        """Whether nothing reads them any more."""
        ...

    def send(self) -> None: ...

    def drop(self) -> None: ...


class SendingChannel(Protocol):
    """Never blocks; what fails is told to the `on_error` that it was made with. For one thread."""

    slot_bytes: int

    @property
    def is_full(self) -> bool:
        """Whether blocks have to be fetched before another one can be held."""
        ...

    def hold(self, part: range, block: Block, ids: PageIds) -> Held:
        """The heads `part` of a block, pages `ids` of the pool, which must not change."""
        ...

    def send_nothing(self, num_bytes: int) -> None:
        """In place of a block of a request that is gone."""
        ...

    def close(self) -> None: ...


class ReceivingChannel(Protocol):
    """Never blocks, but in `write`; what fails is told to the `on_error` that it was made with."""

    slot_bytes: int

    def address_of(self, part: range, block: Block, ids: PageIds) -> int | None:
        """Where to `receive` the heads `part` of a block, for them to be in pages `ids` of the pool then; None if these
        are not one piece of memory.
        """
        ...

    def receive(
        self,
        slot: int,
        num_bytes: int,
        address: int | None,
        when_queued: Callable[[], None],
        when_over: Callable[[bool], None],
    ) -> None:
        """Has the next block received, at `address` or, if None, into a slot.

        Once `when_queued` has been called, it may come. `when_over` is always called, with whether it has come, when
        nothing is received there any more, and may `write` what is in the slot. Both are called in threads of the
        channel, each in the order of the blocks until it is closed.
        """
        ...

    def write(self, slot: int, part: range, block: Block, ids: PageIds) -> None:
        """From a slot to pages `ids` of the pool; returns when they are there."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ChannelMaker:
    """How one side makes its ends of channels. `gpu` is which GPU it has: one that both have is no way. `check_memory`
    raises RuntimeError when there is none for slots of so many bytes.

    Both make slots of the smaller `slot_bytes`. `sender` and `receiver` also take what is to be called, in any thread,
    when the channel does not work any more, with the reason; `sender` then what is to be called, in the same way, when
    the pages of a block that has been sent are not read any more.
    """

    gpu: str
    new_id: Callable[[], bytes]
    sender: Callable[[bytes, int, Callable[[str], None], Callable[[], None]], SendingChannel]
    receiver: Callable[[bytes, int, Callable[[str], None]], ReceivingChannel]
    slot_bytes: int
    check_memory: Callable[[int], object]
