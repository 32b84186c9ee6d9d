"""Malformed frames against both sides of a transfer: `python tests/fuzz_transfer.py --frames 100000`.

Ends with status 1 when a thread stops, an honest request is not served, or memory grows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import psutil
from hostile import FRAMES, FakeDecode, FakePrefill
from transfer_peers import Cluster, Tubes, asked, cluster, received, rows, send_owned, wait_for

from sglang_apb.transfer.decode.request import RequestState

A_ROUND = 1000
# Python keeps some of what it took; a leak of 400 bytes a frame would show in 100,000 frames.
# What is kept of requests that are not known is bounded (prefill/notices.py), and the allocator keeps some.
MAX_GROWTH_MIB = 64
HONEST = np.arange(400, 420)


@dataclass
class Report:
    """How many hostile frames of each kind were sent, and honest requests served among them."""

    sent: Counter[str] = field(default_factory=Counter)
    num_honest: int = 0
    seconds: float = 0.0
    growth_mib: float = 0.0


def decode_side(num_frames: int, seed: int) -> Report:
    """A prefill rank that a decode server asks for KV sends anything but that."""

    def attack(peers: Cluster, prefill: FakePrefill, rng: random.Random, report: Report, count: int) -> None:
        request = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        _, attempt = prefill.wait_for_ask(request.attempt)
        for _ in range(count):
            prefill.send(_next(rng, 1, attempt, report))
        prefill.send([b"x" * (64 << 20)])  # larger than any frame: ZMQ closes the connection
        assert wait_for(lambda: request.state is not RequestState.RECEIVING), "a hostile request goes on for ever"
        assert request.state is RequestState.FAILED, "complete, although nothing right was sent"
        assert not any(rows(peers.aux, [0])), "a first token from nowhere"
        # The room may have failed before that last frame came: the next one needs a connection of its own.
        assert wait_for(lambda: prefill.address not in peers.receiver._peers), "a hostile rank's connection stays"
        peers.receiver.close(request)

    with cluster(tubes=Tubes()) as peers, FakePrefill() as prefill:
        return _run(peers, num_frames, seed, lambda *rest: attack(peers, prefill, *rest))


def prefill_side(num_frames: int, seed: int) -> Report:
    """Anyone who can connect to a prefill rank sends it anything."""

    def attack(peers: Cluster, rng: random.Random, report: Report, count: int) -> None:
        with FakeDecode(peers) as stranger:
            for _ in range(count):
                stranger.send(_next(rng, rng.randrange(1 << 60), rng.randrange(1 << 40), report))
            stranger.send([b"x" * (4 << 20)])

    with cluster(tubes=Tubes()) as peers:
        return _run(peers, num_frames, seed, lambda *rest: attack(peers, *rest))


SIDES: dict[str, Callable[..., Report]] = {"decode": decode_side, "prefill": prefill_side}


def _run(peers: Cluster, num_frames: int, seed: int, attack: Callable[[random.Random, Report, int], None]) -> Report:
    rng, report = random.Random(seed), Report()
    started, before = time.monotonic(), 0.0
    while report.sent.total() < num_frames:
        attack(rng, report, min(A_ROUND, num_frames - report.sent.total()))
        serve_honest(peers, 10_000 + report.num_honest)
        report.num_honest += 1
        if report.sent.total() >= num_frames // 4 and not before:
            before = _memory_mib(peers)
    report.seconds, report.growth_mib = time.monotonic() - started, _memory_mib(peers) - before
    return report


def serve_honest(peers: Cluster, room_id: int) -> None:
    decode, transfer = peers.ask(room_id, HONEST), peers.senders[0].open(room_id)
    assert asked(transfer), "the prefill thread does not hear an honest ask"
    send_owned(peers.senders[0], transfer, HONEST - 400, [(0, 20)], 1)
    assert received(decode), f"an honest request failed: {decode.reason}"
    assert rows(peers.pool, HONEST) == rows(peers.pools[0], HONEST - 400), "an honest request got wrong bytes"
    peers.receiver.close(decode)
    peers.senders[0].close(transfer)


def _next(rng: random.Random, room: int, attempt: int, report: Report) -> list:
    name = rng.choice(list(FRAMES))
    report.sent[name] += 1
    return FRAMES[name](rng, room, attempt)


def _memory_mib(peers: Cluster) -> float:
    """In use, once connections of strangers are gone, each of which has megabytes that wait to be read."""
    assert wait_for(lambda: all(len(sender._peers) <= 1 for sender in peers.senders)), "strangers stay connected"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000, help="against each side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    status = 0
    for side, run in SIDES.items():
        report = run(args.frames, args.seed)
        kinds = ", ".join(f"{count} {name}" for name, count in report.sent.most_common())
        print(f"{side} side: {report.sent.total()} frames in {report.seconds:.0f} s ({kinds});")
        print(f"  {report.num_honest} honest requests served in between; memory grew by {report.growth_mib:.1f} MiB")
        if report.growth_mib > MAX_GROWTH_MIB:
            print(f"  MORE THAN {MAX_GROWTH_MIB} MiB", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
