"""Frames between one prefill rank and one decode rank, and the checks on each of them.

A frame is two or three ZMQ parts: header, body, and for DATA, AUX and OFFER a payload of raw bytes.

    header   magic "SAPB" | version u8 | kind u8 | asker u16 | room u64 | attempt u64 | checksum u64
    body     DATA, OFFER, READY: four u32 (Block), FETCH: these and u64 (bytes);
             ASK, ANNOUNCE, END, STOP, JOIN: msgpack with bounded fields; else empty

`room` is SGLang's bootstrap room; of several decode ranks that one prefill rank serves, `asker` is the one. `attempt`
is chosen by the decode side for each ask, so that a late frame of an earlier transfer in the same room is recognised.
The checksum is XXH3-64 over everything else.
The header and STOP keep their layout in all versions: a peer of another one can be told why it is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Meta

from sglang_apb.transfer.protocol.compat import Compat

MAGIC = b"SAPB"
VERSION = 7
MAX_PARTS = 3
MAX_BODY_BYTES = 1 << 20
MAX_PAGES = 1 << 26
MAX_RANGES = 4096
MAX_ASKERS = 1024
MAX_INFO_ENTRIES = 16

_HEADER = struct.Struct("!4sBBHQQQ")
_CHECKSUM_AT = _HEADER.size - 8
_BLOCK = struct.Struct("!IIII")

Buffer: TypeAlias = bytes | bytearray | memoryview
PageIds: TypeAlias = npt.NDArray[np.int64]

HeadNumber = Annotated[int, Meta(ge=0, le=1 << 16)]
PageNumber = Annotated[int, Meta(ge=0, le=MAX_PAGES)]
ByteCount = Annotated[int, Meta(ge=0, le=1 << 62)]
InfoText = Annotated[str, Meta(max_length=256)]
InfoNumber = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]
Info = Annotated[dict[Annotated[str, Meta(max_length=64)], InfoNumber | InfoText], Meta(max_length=MAX_INFO_ENTRIES)]


class WireError(ValueError):
    """A frame that is not one of ours, or is damaged. It is dropped."""


class VersionError(WireError):
    """A frame of another wire version. Its header is readable: `frame` carries room and attempt."""

    def __init__(self, version: int, frame: Frame):
        super().__init__(f"wire version {version}, this side speaks version {VERSION}")
        self.version = version
        self.frame = frame


class Kind(IntEnum):
    ASK = 1
    ANNOUNCE = 2
    DATA = 3
    AUX = 4
    END = 5
    DONE = 6
    STOP = 7
    EXPECT = 8  # decode to prefill: an ASK for this room will follow when there is memory for its KV
    PING = 9  # nothing: shows whether a connection is there, and to prefill, which one pings go over
    OFFER = 10  # planes/cuda_ipc
    KEPT = 11
    JOIN = 12  # planes/nccl
    READY = 13
    FETCH = 14


# Of data planes that bring their own: what is in them is the plane's matter.
PLANE_KINDS = range(64, 128)
_WITH_PAYLOAD = (Kind.DATA, Kind.AUX, Kind.OFFER)


def name_of(kind: int) -> str:
    return f"kind {kind}" if kind in PLANE_KINDS else Kind(kind).name


@dataclass(frozen=True)
class Frame:
    """A frame whose checksum is right. `payload` is None except for DATA, AUX, OFFER, and what PLANE_KINDS have."""

    kind: int
    room: int
    attempt: int
    body: Buffer = b""
    payload: Buffer | None = None
    asker: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Of one transfer: the request, and which decode rank it goes to."""
        return self.room, self.asker


@dataclass(frozen=True)
class Block:
    """Pages [first_page, first_page + num_pages) of the request in buffers [first_buffer, + num_buffers).

    Page numbers count within the pages that were asked for, so a peer can never name a page of the pool.
    The payload holds, buffer after buffer, the block's pages.
    """

    first_buffer: int
    num_buffers: int
    first_page: int
    num_pages: int

    def pack(self) -> bytes:
        return _BLOCK.pack(self.first_buffer, self.num_buffers, self.first_page, self.num_pages)

    @classmethod
    def unpack(cls, body: Buffer) -> tuple[Block, Buffer]:
        """With the rest of `body`. Raises WireError when that is too short."""
        if len(body) < _BLOCK.size:
            raise WireError(f"a block of {len(body)} bytes")
        return cls(*_BLOCK.unpack_from(body)), memoryview(body)[_BLOCK.size :]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode to prefill: `num_pages` pages wait for this room's KV after `prefix_tokens`, which are there.

    They hold the model's KV heads [start, end); `num_askers` decode ranks ask this prefill rank, each for its own. Of
    share[1] ranks with the same heads and tokens that this decode rank asks, it is number share[0], and sends a part.
    `prompt` is the digest of the prompt, where it is known.
    """

    compat: Compat
    num_pages: PageNumber
    prefix_tokens: PageNumber
    heads: tuple[HeadNumber, HeadNumber]
    num_askers: Annotated[int, Meta(ge=1, le=MAX_ASKERS)] = 1
    share: tuple[HeadNumber, HeadNumber] = (0, 1)
    prompt: Annotated[bytes, Meta(max_length=16)] = b""

    def __post_init__(self) -> None:
        if self.share[0] >= self.share[1]:
            raise ValueError(f"share {self.share[0]} of {self.share[1]}")


class Announce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill to decode, first: the page ranges [start, end) that this rank is going to send."""

    ranges: Annotated[list[tuple[PageNumber, PageNumber]], Meta(max_length=MAX_RANGES)]


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill to decode, last: the KV bytes this rank sent, how many of them before the prefill ended, and what it
    has to tell about the prefill."""

    num_bytes: ByteCount
    num_hidden_bytes: ByteCount
    info: Info


class Stop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either way: this transfer has failed, for this reason."""

    reason: Annotated[str, Meta(max_length=2000)]


Message: TypeAlias = Ask | Announce | End | Stop
M = TypeVar("M", Ask, Announce, End, Stop)
T = TypeVar("T")

_KIND_OF: dict[type, Kind] = {
    Ask: Kind.ASK,
    Announce: Kind.ANNOUNCE,
    End: Kind.END,
    Stop: Kind.STOP,
}
_DECODERS: dict[Kind, msgspec.msgpack.Decoder] = {
    kind: msgspec.msgpack.Decoder(message) for message, kind in _KIND_OF.items()
}
_encoder = msgspec.msgpack.Encoder()


def pack(
    kind: int, room: int, attempt: int, body: bytes = b"", payload: Buffer | None = None, asker: int = 0
) -> list[Buffer]:
    """The parts of one frame. `payload` is not copied."""
    parts: list[Buffer] = [body] if payload is None else [body, payload]
    header = bytearray(_HEADER.pack(MAGIC, VERSION, kind, asker, room, attempt, 0))
    struct.pack_into("!Q", header, _CHECKSUM_AT, _checksum(header, parts))
    return [bytes(header), *parts]


def pack_message(message: Message, room: int, attempt: int, asker: int = 0) -> list[Buffer]:
    return pack(_KIND_OF[type(message)], room, attempt, _encoder.encode(message), asker=asker)


def parse(parts: Sequence[Buffer]) -> Frame:
    """Raises VersionError for another wire version, WireError for anything else that is not a frame."""
    if not 2 <= len(parts) <= MAX_PARTS:
        raise WireError(f"{len(parts)} parts")
    header = parts[0]
    if len(header) != _HEADER.size:
        raise WireError(f"header of {len(header)} bytes")
    magic, version, kind, asker, room, attempt, checksum = _HEADER.unpack(header)
    if magic != MAGIC:
        raise WireError(f"magic {magic!r}")
    if version != VERSION and kind != Kind.STOP:
        raise VersionError(version, Frame(Kind.ASK, room, attempt, asker=asker))
    if len(parts[1]) > MAX_BODY_BYTES:
        raise WireError(f"body of {len(parts[1])} bytes")
    if kind not in PLANE_KINDS and kind not in Kind.__members__.values():
        raise WireError(f"unknown kind {kind}")
    if kind not in PLANE_KINDS and (len(parts) == MAX_PARTS) != (kind in _WITH_PAYLOAD):
        raise WireError(f"{name_of(kind)} with {len(parts)} parts")
    blank = bytes(header[:_CHECKSUM_AT]) + bytes(8)
    if _checksum(blank, parts[1:]) != checksum:
        raise WireError(f"{name_of(kind)} with a wrong checksum")
    payload = parts[2] if len(parts) == MAX_PARTS else None
    return Frame(kind if kind in PLANE_KINDS else Kind(kind), room, attempt, parts[1], payload, asker)


def place_of(parts: Sequence[Buffer]) -> tuple[int, int, int]:
    """Room, attempt and asker of what may be a frame; zeros if it is not."""
    try:
        frame = parse(parts)
    except WireError:
        return 0, 0, 0
    return frame.room, frame.attempt, frame.asker


def parse_message(frame: Frame, message: type[M]) -> M:
    """Raises WireError when the body is not a `message` with every field in its bounds."""
    decoder: msgspec.msgpack.Decoder[M] = _DECODERS[_KIND_OF[message]]
    return decode_body(frame, decoder)


def decode_body(frame: Frame, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises WireError when the body is not what `decoder` reads, with every field in its bounds."""
    try:
        return decoder.decode(frame.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{name_of(frame.kind)}: {error}") from error


def check_info(info: Mapping[str, int | str]) -> dict[str, int | str]:
    """`info` as END carries it, flags as 0 or 1. Raises ValueError when it does not fit."""
    plain = {key: int(value) if isinstance(value, bool) else value for key, value in info.items()}
    try:
        return msgspec.convert(plain, Info)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"Prefill info must be at most {MAX_INFO_ENTRIES} short strings or integers: {error}"
        ) from error


def parse_block(frame: Frame, item_lens: Sequence[int], num_pages: int) -> Block:
    """The block of a DATA frame for a request of `num_pages` pages.

    `item_lens` are the bytes of one page in each buffer of the pool. Raises WireError when the block reaches
    outside the pool's buffers or the request's pages, or the payload is not exactly as long as the block.
    """
    block = block_of(frame, len(item_lens), num_pages)
    check_payload(frame, block, block_bytes(block, item_lens))
    return block


def block_of(frame: Frame, num_buffers: int, num_pages: int) -> Block:
    """The block that is a frame's whole body. Raises WireError as `parse_block` does."""
    name = name_of(frame.kind)
    if len(frame.body) != _BLOCK.size:
        raise WireError(f"{name}: body of {len(frame.body)} bytes")
    block = Block(*_BLOCK.unpack(frame.body))
    if not (block.num_buffers >= 1 and block.first_buffer + block.num_buffers <= num_buffers):
        raise WireError(f"{name}: {block} reaches outside {num_buffers} buffers")
    if not (block.num_pages >= 1 and block.first_page + block.num_pages <= num_pages):
        raise WireError(f"{name}: {block} reaches outside {num_pages} pages")
    return block


def check_payload(frame: Frame, block: Block, expected: int) -> None:
    if len(frame.payload or b"") != expected:
        raise WireError(f"{name_of(frame.kind)}: payload of {len(frame.payload or b'')} bytes, {block} has {expected}")


def block_bytes(block: Block, item_lens: Sequence[int]) -> int:
    return block.num_pages * sum(item_lens[block.first_buffer : block.first_buffer + block.num_buffers])


def _checksum(header: Buffer, parts: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64(header)
    for part in parts:
        # The length keeps a byte from moving between body and payload unseen.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.intdigest()
