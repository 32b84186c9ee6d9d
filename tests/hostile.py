"""Peers that send what they like, and what they send."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

import msgspec
import numpy as np
import zmq
from transfer_peers import AUX_LENS, COMPAT, ITEM_LENS, Cluster

from sglang_apb.transfer.planes.cuda_ipc.halves import pack_page_ids
from sglang_apb.transfer.planes.nccl.channels import MIN_SLOT_BYTES, Join, pack_fetch
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Announce, Ask, Block, End, Kind, Stop

SLOTS = (0, MIN_SLOT_BYTES, 2**62)

Parts: TypeAlias = list[wire.Buffer]


class FakeDecode:
    """A decode server that sends what it likes."""

    def __init__(self, peers: Cluster):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(f"tcp://127.0.0.1:{peers.senders[0].port}")

    def __enter__(self) -> FakeDecode:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, parts: Parts) -> None:
        self.socket.send_multipart(parts or [b""])


class FakePrefill:
    """A prefill rank that sends what it likes: one ROUTER that knows the decode server that asked."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.address = ("127.0.0.1", self.socket.bind_to_random_port("tcp://127.0.0.1"))

    def __enter__(self) -> FakePrefill:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def wait_for_ask(self, attempt: int | None = None) -> tuple[int, int]:
        """Room and attempt of the next ASK, or of the one with `attempt`."""
        while True:
            assert self.socket.poll(5000)
            self.peer, *parts = self.socket.recv_multipart()
            frame = wire.parse(parts)
            if frame.kind is Kind.ASK and attempt in (None, frame.attempt):
                return frame.room, frame.attempt

    def send(self, parts: Parts) -> None:
        self.socket.send_multipart([self.peer, *(parts or [b""])])


def honest_frames(room: int, attempt: int, pool_seed: int = 1) -> list[Parts]:
    """Eight pages, one frame a buffer."""
    data = random.Random(pool_seed)
    blocks = [Block(buffer, 1, 0, 8) for buffer in range(len(ITEM_LENS))]
    return [
        wire.pack_message(Announce([(0, 8)]), room, attempt),
        *(
            wire.pack(Kind.DATA, room, attempt, block.pack(), data.randbytes(wire.block_bytes(block, ITEM_LENS)))
            for block in blocks
        ),
        wire.pack(Kind.AUX, room, attempt, b"", data.randbytes(sum(AUX_LENS))),
        wire.pack_message(End(8 * sum(ITEM_LENS), 0, {}), room, attempt),
    ]


def random_parts(rng: random.Random, room: int, attempt: int) -> Parts:
    return [rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(8))]


def truncated(rng: random.Random, room: int, attempt: int) -> Parts:
    frame = rng.choice(honest_frames(room, attempt))
    part = rng.randrange(len(frame))
    frame[part] = bytes(frame[part])[: rng.randrange(len(frame[part]) + 1)] + rng.randbytes(2)
    return frame


def other_version(rng: random.Random, room: int, attempt: int) -> Parts:
    header, *rest = rng.choice(honest_frames(room, attempt))
    changed = bytearray(header)
    changed[4] = rng.choice((0, 1, 3, 255))
    return [bytes(changed), *rest]


def huge_block(rng: random.Random, room: int, attempt: int) -> Parts:
    """A right checksum over counts that name more than there is."""
    block = Block(*(rng.choice((0, 1, 7, 8, 2**31, 2**32 - 1)) for _ in range(4)))
    return wire.pack(Kind.DATA, room, attempt, block.pack(), rng.randbytes(rng.randrange(2000)))


def huge_message(rng: random.Random, room: int, attempt: int) -> Parts:
    """MessagePack that says it holds four billion entries, or a well-formed message of large numbers."""
    kind = rng.choice((Kind.ASK, Kind.ANNOUNCE, Kind.END, Kind.STOP))
    body = rng.choice((b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 100_000))
    lens = [1] * 8192
    large = msgspec.structs.replace(COMPAT, kv_head_lens=lens, aux_item_lens=lens)
    asks = Ask(large, 2**26, 2**26, (0, 2**16), share=(rng.randrange(2**16), 2**16))
    ranges = Announce([(2 * page, 2 * page + 1) for page in range(wire.MAX_RANGES)])
    return rng.choice(
        (wire.pack(kind, room, attempt, body), wire.pack_message(rng.choice((asks, ranges)), room, attempt))
    )


def wrong_kind(rng: random.Random, room: int, attempt: int) -> Parts:
    """Any kind with garbage in it, for this attempt or another."""
    return wire.pack(rng.choice(list(Kind)), room, attempt + rng.randrange(2), rng.randbytes(rng.randrange(30)))


def other_ways(rng: random.Random, room: int, attempt: int) -> Parts:
    """Pages to read where nobody's pool is mapped, blocks to fetch without a channel, and channels to nowhere."""
    block = Block(*(rng.choice((0, 1, 6, 8, 2**32 - 1)) for _ in range(4)))
    ids = np.array([rng.choice((0, 499, 500, 2**32 - 1)) for _ in range(8)], np.int64)
    return rng.choice(
        (
            wire.pack(Kind.OFFER, room, attempt, block.pack(), pack_page_ids(ids)),
            wire.pack(Kind.READY, room, attempt, block.pack()),
            wire.pack(Kind.FETCH, room, attempt, pack_fetch(block, rng.choice((0, 1, 2**26, 2**63)))),
            wire.pack(Kind.KEPT, room, attempt),
            Join(gpu=rng.choice(("", "mine")), slot_bytes=rng.choice(SLOTS)).pack(),
            Join(unique_id=rng.randbytes(128), slot_bytes=rng.choice(SLOTS)).pack(),
        )
    )


def replayed(rng: random.Random, room: int, attempt: int) -> Parts:
    """What was right in an earlier transfer."""
    return rng.choice([*honest_frames(room, attempt + 1), wire.pack_message(Stop("x"), room, attempt + 1)])


FRAMES: dict[str, Callable[[random.Random, int, int], Parts]] = {
    make.__name__: make
    for make in (random_parts, truncated, other_version, huge_block, huge_message, wrong_kind, other_ways, replayed)
}


def hostile_frame(rng: random.Random, room: int, attempt: int) -> Parts:
    return rng.choice(list(FRAMES.values()))(rng, room, attempt)
