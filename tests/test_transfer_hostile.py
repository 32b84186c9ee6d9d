"""Frames that are lost, damaged, late, or sent to do harm: nothing is ever half there, and nobody else notices."""

from __future__ import annotations

import time

import fuzz_transfer
import numpy as np
import pytest
from hostile import FRAMES, FakePrefill, honest_frames
from transfer_peers import cluster, received, rows

from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.heartbeats import heartbeat_of
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Kind, Stop


@pytest.mark.parametrize("dropped", range(9))
def test_a_dropped_frame_is_never_complete(dropped: int) -> None:
    with cluster() as peers, FakePrefill() as prefill:
        decode = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        room, attempt = prefill.wait_for_ask()
        frames = honest_frames(room, attempt)
        for index, frame in enumerate(frames):
            if index != dropped:
                prefill.send(frame)
        assert not received(decode, 0.3)
        last = len(frames) - 1
        expected = RequestState.RECEIVING if dropped in (0, last) else RequestState.FAILED
        assert decode.state is expected
        assert not any(rows(peers.aux, range(8)))


@pytest.mark.parametrize("damaged", range(9))
def test_a_damaged_frame_is_never_complete(damaged: int) -> None:
    with cluster() as peers, FakePrefill() as prefill:
        decode = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        room, attempt = prefill.wait_for_ask()
        for index, frame in enumerate(honest_frames(room, attempt)):
            if index == damaged:
                frame[-1] = bytes(frame[-1][:-1]) + bytes([frame[-1][-1] ^ 1])
            prefill.send(frame)
        assert not received(decode, 0.3)
        assert not any(rows(peers.aux, range(8)))


def test_frames_of_another_attempt_or_room_are_ignored() -> None:
    with cluster() as peers, FakePrefill() as prefill:
        decode = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        room, attempt = prefill.wait_for_ask()
        for frame in (*honest_frames(room, attempt + 1, 2), *honest_frames(room + 1, attempt, 3)):
            prefill.send(frame)
        time.sleep(0.1)
        assert decode.state is RequestState.RECEIVING and not any(rows(peers.pool, range(500)))
        for frame in honest_frames(room, attempt):
            prefill.send(frame)
        assert received(decode)


def test_a_decode_server_answers_pings_and_nothing_else() -> None:
    """Two sides that answered everything would never end: a prefill rank tells one whose key was revoked so."""
    with cluster() as peers, FakePrefill() as prefill:
        peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        prefill.wait_for_ask()
        prefill.peer = heartbeat_of(prefill.peer)
        while prefill.socket.poll(500):  # its first ping
            prefill.socket.recv_multipart()
        for frame in (wire.pack_message(Stop("no"), 0, 0), [b"x"], [b""], wire.pack(Kind.DONE, 1, 2)):
            prefill.send(frame)
        assert not prefill.socket.poll(300)
        prefill.send(wire.pack(Kind.PING, 0, 0))
        assert prefill.socket.poll(2000)


@pytest.mark.parametrize("side", fuzz_transfer.SIDES)
def test_hostile_frames_harm_nobody(side: str, caplog: pytest.LogCaptureFixture) -> None:
    """`python tests/fuzz_transfer.py` sends many more."""
    report = fuzz_transfer.SIDES[side](num_frames=4000, seed=5)
    assert report.num_honest > 2 and set(report.sent) == set(FRAMES)
    assert not [record for record in caplog.records if record.exc_info]
    assert len([record for record in caplog.records if "dropped a frame" in record.message]) < 100
