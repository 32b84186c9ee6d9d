from __future__ import annotations

import ast
import random
import struct
from pathlib import Path

import pytest
from transfer_peers import COMPAT, ITEM_LENS

import sglang_apb.transfer
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Announce, Ask, Block, End, Kind, Stop, WireError

NUM_PAGES = 40
MESSAGES = [
    Ask(COMPAT, 12, 64, (2, 4), 3),
    Announce([(0, 3), (7, 12)]),
    End(123456, 1234, {"method": "apb", "ranks": 2}),
    Stop("The pages are gone."),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_round_trip(message: wire.Message) -> None:
    frame = wire.parse(wire.pack_message(message, 2**63 + 5, 77, 9))
    assert (frame.room, frame.attempt, frame.asker) == (2**63 + 5, 77, 9)
    assert wire.parse_message(frame, type(message)) == message


def _data_parts(block: Block) -> list[wire.Buffer]:
    payload = random.Random(1).randbytes(wire.block_bytes(block, ITEM_LENS))
    return wire.pack(Kind.DATA, 5, 6, block.pack(), payload)


def test_block_round_trip() -> None:
    block = Block(1, 3, 4, 9)
    frame = wire.parse(_data_parts(block))
    assert wire.parse_block(frame, ITEM_LENS, NUM_PAGES) == block
    assert len(frame.payload or b"") == 9 * (160 + 96 + 160)


@pytest.mark.parametrize(
    "block",
    [
        Block(6, 1, 0, 1),
        Block(5, 2, 0, 1),
        Block(0, 0, 0, 1),
        Block(0, 1, NUM_PAGES, 1),
        Block(0, 1, NUM_PAGES - 1, 2),
        Block(0, 1, 0, 0),
        Block(2**32 - 1, 2, 0, 1),
        Block(0, 1, 2**32 - 1, 2),
    ],
)
def test_block_outside_the_request_is_refused(block: Block) -> None:
    frame = wire.Frame(Kind.DATA, 5, 6, block.pack(), bytes(4096))
    with pytest.raises(WireError, match="outside"):
        wire.parse_block(frame, ITEM_LENS, NUM_PAGES)


def test_payload_of_another_length_is_refused() -> None:
    frame = wire.Frame(Kind.DATA, 5, 6, Block(0, 1, 0, 2).pack(), bytes(191))
    with pytest.raises(WireError, match="payload of 191 bytes"):
        wire.parse_block(frame, ITEM_LENS, NUM_PAGES)


def test_every_flipped_byte_is_noticed() -> None:
    parts = [bytes(part) for part in _data_parts(Block(0, 1, 0, 1))]
    for index, part in enumerate(parts):
        for position in range(len(part)):
            damaged = bytearray(part)
            damaged[position] ^= 1 << (position % 8)
            with pytest.raises(WireError):
                wire.parse([*parts[:index], bytes(damaged), *parts[index + 1 :]])


def test_a_byte_cannot_move_between_parts() -> None:
    header, body, payload = (bytes(part) for part in _data_parts(Block(0, 1, 0, 1)))
    with pytest.raises(WireError, match="checksum"):
        wire.parse([header, body + payload[:1], payload[1:]])


def test_another_version_keeps_room_and_attempt() -> None:
    parts = wire.pack_message(MESSAGES[0], 5, 6)
    header = bytearray(parts[0])
    header[4] = 9
    with pytest.raises(wire.VersionError) as caught:
        wire.parse([bytes(header), parts[1]])
    assert (caught.value.version, caught.value.frame.room, caught.value.frame.attempt) == (9, 5, 6)


@pytest.mark.parametrize(
    "info", [{str(i): i for i in range(17)}, {"k": 2**63}, {"k" * 65: 1}, {"k": "v" * 257}, {"k": 1.5}]
)
def test_info_is_bounded(info: dict) -> None:
    with pytest.raises(ValueError, match="at most 16 short strings or integers"):
        wire.check_info(info)


def _mutate(parts: list[bytes], rng: random.Random) -> list[bytes]:
    choice = rng.randrange(7)
    parts = list(parts)
    index = rng.randrange(len(parts))
    if choice == 0:
        return [rng.randbytes(rng.randrange(80)) for _ in range(rng.randrange(6))]
    if choice == 1:
        parts[index] = parts[index][: rng.randrange(len(parts[index]) + 1)]
    elif choice == 2:
        parts[index] += rng.randbytes(rng.randrange(1, 50))
    elif choice == 3:
        parts.insert(index, rng.randbytes(rng.randrange(40)))
    elif choice == 4:
        del parts[index]
    else:
        damaged = bytearray(parts[index] or b"\0")
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        parts[index] = bytes(damaged)
    return parts


def test_malformed_frames_raise_wire_error_only() -> None:
    rng = random.Random(7)
    honest = [[bytes(p) for p in wire.pack_message(m, 5, 6)] for m in MESSAGES]
    honest.append([bytes(part) for part in _data_parts(Block(0, 2, 3, 4))])
    refused = 0
    for _ in range(5000):
        parts = rng.choice(honest)
        mutated = _mutate(parts, rng)
        try:
            assert mutated == parts or wire.parse(mutated) is None
        except WireError:
            refused += 1
    assert refused > 4500


def test_well_formed_frames_with_wrong_fields_raise_wire_error_only() -> None:
    """The checksum is right here, so the fields' own bounds are what refuses."""
    rng = random.Random(8)
    kinds = (Kind.ASK, Kind.ANNOUNCE, Kind.END, Kind.STOP)
    for _ in range(5000):
        kind = rng.choice(kinds)
        body = bytearray(wire.pack_message(MESSAGES[kinds.index(kind)], 5, 6)[1])
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        frame = wire.parse(wire.pack(kind, 5, 6, bytes(body)))
        message = type(MESSAGES[kinds.index(kind)])
        try:
            parsed = wire.parse_message(frame, message)
        except WireError:
            continue
        assert isinstance(parsed, message)


def test_negative_and_huge_ranges_are_refused() -> None:
    for ranges in (b"\x92\xff\x01", b"\x92\x00\xcf" + struct.pack("!Q", 2**63)):
        frame = wire.Frame(Kind.ANNOUNCE, 5, 6, b"\x81\xa6ranges\x91" + ranges)
        with pytest.raises(WireError):
            wire.parse_message(frame, Announce)


def test_nothing_in_the_transfer_can_unpickle() -> None:
    folder = Path(sglang_apb.transfer.__file__).parent
    sources = [*folder.rglob("*.py"), folder.parents[1] / "patches" / "transfer_backend.py"]
    assert len(sources) >= 12
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "recv_pyobj", "send_pyobj", "eval", "exec"}
    for source in sources:
        tree = ast.parse(source.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not names & forbidden, source
        assert "pickle" not in source.read_text(), source
