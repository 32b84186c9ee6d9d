"""Who is alive, as long as ZMQ's own thread does not watch yet; with a clock of the test's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_apb.transfer import heartbeats
from sglang_apb.transfer.heartbeats import Heartbeats, heartbeat_of
from sglang_apb.transfer.loop import PING_MS, SILENCE_MS, WATCH_MS
from sglang_apb.transfer.prefill.endpoint import PROBE_MS

PEER = b"\1peer"


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_peer_that_stops_in_its_first_second_is_silent(clock: Clock) -> None:
    known = Heartbeats(10)
    known.hear(heartbeat_of(PEER))
    clock.now += 0.5
    known.hear(PEER)
    clock.now += 3.9
    assert not known.is_silent(PEER)
    clock.now += 0.2
    assert known.is_silent(PEER)


def test_prefill_notices_within_the_promise_and_after_decode() -> None:
    """Decode's last ping is up to PING_MS older than prefill's watch, and is given up PING_MS + SILENCE_MS later."""
    assert WATCH_MS > PING_MS + PING_MS + SILENCE_MS
    assert WATCH_MS + PROBE_MS < 5000


def test_later_zmq_watches_and_a_busy_thread_is_not_taken_for_a_dead_one(clock: Clock) -> None:
    known = Heartbeats(10)
    known.hear(heartbeat_of(PEER))
    clock.now += 2
    known.hear(PEER)
    clock.now += 1000
    assert not known.is_silent(PEER)


def test_both_connections_are_probed_once_both_have_spoken(clock: Clock) -> None:
    known = Heartbeats(10)
    known.hear(PEER)
    assert known.connections(PEER) == [PEER] and not known.is_silent(PEER)
    known.hear(heartbeat_of(PEER))
    assert known.connections(PEER) == [PEER, heartbeat_of(PEER)]
    known.forget(PEER)
    assert known.connections(PEER) == [PEER]


def test_strangers_are_forgotten_and_of_bounded_number(clock: Clock) -> None:
    known = Heartbeats(3)
    for number in range(5):
        known.hear(heartbeat_of(b"\1%d" % number))
    assert [len(known.connections(b"\1%d" % number)) for number in range(5)] == [2, 2, 2, 1, 1]
    clock.now += 61
    known.forget_strangers({b"\1" + b"0"})
    assert [len(known.connections(b"\1%d" % number)) for number in range(3)] == [2, 1, 1]
