"""Requests with known bytes between processes that are killed and stopped at random.

    python tests/soak_transfer.py --requests 500

Ends with status 1 when a request gets wrong bytes, hangs, or fails although none of its processes was struck; when
bytes arrive after a request was closed; or when a process that lived keeps rooms, threads, files or memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import psutil
from transfer_peers import (
    AUX_LENS,
    COMPAT,
    HEADS,
    NUM_LAYERS,
    NUM_POOL_PAGES,
    decode_endpoint,
    make_pages,
    rows,
    send_owned,
    start_sending,
)

from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.memory.pages import HostPages
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState
from sglang_apb.transfer.protocol.hosts import Address

NUM_PREFILL, NUM_DECODE, NUM_AT_ONCE = 4, 2, 8
PAGES_A_REQUEST = 40
CONTACT_S = 5.0  # a prefill rank gives up a request of which no decode server has spoken
SETTLES_S = 1.0  # after a process goes on, in which its timers and its peers' may still find that it had stopped
LIMIT_S = 12.0  # 5 s to notice a fault, and time for a busy machine
MAX_GROWTH_MIB = 30
_UNUSED = 0xEE
_POLL_S = 0.005


@dataclass(frozen=True)
class Job:
    """`sources[i]`: of prefill rank i its address, its pool's seed, its pages; `target`: the decode server's pages."""

    room: int
    sources: tuple[tuple[Address, int, tuple[int, ...]], ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    room: int
    is_whole: bool
    reason: str = ""


@dataclass(frozen=True)
class Left:
    """What a worker has when nothing is asked of it."""

    rooms: int
    threads: int
    files: int
    mib: float

    @classmethod
    def here(cls, rooms: int) -> Left:
        me = psutil.Process()
        return cls(rooms, me.num_threads(), me.num_fds(), me.memory_info().rss / 2**20)


# workers


def prefill(pipe: Connection, seed: int) -> None:
    sender = PrefillEndpoint("127.0.0.1")
    start_sending(sender, make_pages(seed), make_pages(seed, AUX_LENS, 8), COMPAT, HEADS)
    pipe.send(Address("127.0.0.1", sender.port))
    transfers: dict[int, tuple[Transfer, Job, float]] = {}
    sent: set[int] = set()
    while True:
        if pipe.poll(_POLL_S):
            job = pipe.recv()
            if job is None:
                pipe.send(Left.here(len(sender.transfers)))
            else:
                transfers[job.room] = (sender.open(job.room), job, time.monotonic())
        for transfer, job, opened in list(transfers.values()):
            if transfer.state is TransferState.ASKED and transfer.room not in sent:
                sent.add(transfer.room)
                _send(sender, transfer, job, seed)
            was_left_alone = not transfer.peer and time.monotonic() - opened > CONTACT_S
            if was_left_alone or transfer.state in (TransferState.DONE, TransferState.FAILED):
                sender.close(transfer)
                del transfers[transfer.room]
                pipe.send(Ended(transfer.room, transfer.state is TransferState.DONE, transfer.reason))


def _send(sender: PrefillEndpoint, transfer: Transfer, job: Job, seed: int) -> None:
    start = 0
    for rank, (_, owner, ids) in enumerate(job.sources):
        if owner == seed:
            everywhere = np.zeros(start + len(ids), np.int64)
            everywhere[start:] = ids
            owned = [(start, start + len(ids))]
            send_owned(sender, transfer, everywhere, owned, 0 if rank == 0 else None, num_layers=NUM_LAYERS)
        start += len(ids)


def decode(pipe: Connection, seed: int) -> None:
    pool = make_pages(None)
    for buffer in pool._rows:
        buffer[:] = _UNUSED
    receiver = decode_endpoint(pool, make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    receiver.start()
    pipe.send(None)
    requests: dict[int, tuple[DecodeRequest, Job]] = {}
    while True:
        if pipe.poll(_POLL_S):
            job = pipe.recv()
            if job is None:
                pipe.send(Left.here(len(receiver._requests)))
            else:
                addresses = [address for address, _, _ in job.sources]
                requests[job.room] = (receiver.open(job.room, addresses, np.array(job.target), 0), job)
        for request, job in list(requests.values()):
            if request.state is not RequestState.RECEIVING:
                receiver.close(request)
                del requests[job.room]
                pipe.send(_judge(request, job, pool))


def _judge(request: DecodeRequest, job: Job, pool: HostPages) -> Ended:
    """What came, after the room was closed: nothing may be written any more. The pages are marked as unused again."""
    found = rows(pool, job.target)
    is_whole = request.state is RequestState.COMPLETE
    reason = request.reason
    if is_whole and found != _wanted(job):
        reason = "WRONG BYTES"
    time.sleep(_POLL_S)
    if rows(pool, job.target) != found:
        reason = "BYTES AFTER IT WAS CLOSED"
    for buffer in pool._rows:
        buffer[list(job.target)] = _UNUSED
    return Ended(job.room, is_whole, reason)


def _wanted(job: Job) -> bytes:
    """Buffer after buffer, each with the pages of all ranks."""
    pools = [(make_pages(seed), ids) for _, seed, ids in job.sources]
    num_buffers = len(COMPAT.kv_head_lens)
    return b"".join(
        pool.gather(buffer, 1, np.array(ids)).tobytes() for buffer in range(num_buffers) for pool, ids in pools
    )


# the driver


@dataclass(eq=False)
class Worker:
    main: Callable[[Connection, int], None]
    seed: int
    stopped_until: float = 0.0
    continued: float = 0.0
    begun: Left | None = None
    process: Any = None
    pipe: Any = None
    address: Any = None

    def start(self, context: Any) -> None:
        self.pipe, its_end = context.Pipe()
        self.process = context.Process(target=self.main, args=(its_end, self.seed), daemon=True)
        self.process.start()
        assert self.pipe.poll(60), "a worker does not start"
        self.address = self.pipe.recv()
        self.begun = self.left()

    def left(self) -> Left:
        self.pipe.send(None)
        assert self.pipe.poll(30), "a worker hangs"
        found: Left = self.pipe.recv()
        return found


@dataclass(eq=False)
class Request:
    job: Job
    workers: list[Worker]
    opened: float
    struck: float | None = None  # when one of its processes was, for the last time
    waiting: list[Worker] = field(default_factory=list)


@dataclass
class Report:
    requests: int = 0
    whole: int = 0
    failed: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Soak:
    def __init__(self, num_requests: int, fault_every_s: float, pause_s: float, seed: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["transfer_peers"])
        self._rng = random.Random(seed)
        self._num_requests, self._fault_every_s, self._pause_s = num_requests, fault_every_s, pause_s
        self._prefill = [Worker(prefill, 100 + number) for number in range(NUM_PREFILL)]
        self._decode = [Worker(decode, 200 + number) for number in range(NUM_DECODE)]
        self._free = {worker: set(range(NUM_POOL_PAGES)) for worker in self._decode}
        self._running: dict[int, Request] = {}
        self.report = Report()

    @property
    def _workers(self) -> list[Worker]:
        return [*self._prefill, *self._decode]

    def run(self) -> Report:
        started = time.monotonic()
        for worker in self._workers:
            worker.start(self._context)
        try:
            self._serve()
            self._check_what_is_left()
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
        self.report.seconds = time.monotonic() - started
        return self.report

    def _serve(self) -> None:
        next_fault = time.monotonic() + self._fault_every_s
        next_request = 0.0
        while self.report.requests < self._num_requests or self._running or self._are_stopped():
            now = time.monotonic()
            may_ask = self.report.requests < self._num_requests and len(self._running) < NUM_AT_ONCE
            if may_ask and now >= next_request:
                self._ask()
                next_request = now + self._pause_s
            if now >= next_fault and self.report.requests < self._num_requests:
                self._strike()
                next_fault = now + self._fault_every_s * self._rng.uniform(0.5, 1.5)
            self._continue(now)
            self._collect()
            self._check_for_hangs(time.monotonic())

    def _are_stopped(self) -> bool:
        return any(worker.stopped_until for worker in self._workers)

    def _ask(self) -> None:
        ranks, target = self._rng.sample(self._prefill, 2), self._rng.choice(self._decode)
        half = self._rng.randrange(1, PAGES_A_REQUEST)
        sizes = (half, PAGES_A_REQUEST - half)
        pages = tuple(self._rng.sample(sorted(self._free[target]), PAGES_A_REQUEST))
        self._free[target] -= set(pages)
        self.report.requests += 1
        sources = tuple(
            (rank.address, rank.seed, tuple(self._rng.sample(range(NUM_POOL_PAGES), size)))
            for rank, size in zip(ranks, sizes, strict=True)
        )
        job, now = Job(self.report.requests, sources, pages), time.monotonic()
        request = Request(job, [*ranks, target], now, waiting=[*ranks, target])
        if any(worker.stopped_until or now - worker.continued < SETTLES_S for worker in request.workers):
            request.struck = now
        self._running[job.room] = request
        for worker in request.workers:
            worker.pipe.send(job)

    def _strike(self) -> None:
        worker = self._rng.choice([worker for worker in self._workers if not worker.stopped_until])
        fault = self._rng.choice(("killed", "stopped"))
        self.report.faults[f"{worker.main.__name__} {fault}"] += 1
        now = time.monotonic()
        for request in self._running.values():
            if worker in request.workers:
                request.struck = now
                if fault == "killed" and worker in request.waiting:
                    request.waiting.remove(worker)
        if fault == "killed":
            worker.process.kill()
            worker.process.join()
            if worker in self._free:
                self._free[worker] = set(range(NUM_POOL_PAGES))
            worker.start(self._context)
        else:
            os.kill(worker.process.pid, signal.SIGSTOP)
            worker.stopped_until = now + self._rng.uniform(1, 6)
        self._forget_ended()

    def _continue(self, now: float) -> None:
        for worker in self._workers:
            if worker.stopped_until and worker.stopped_until <= now:
                os.kill(worker.process.pid, signal.SIGCONT)
                worker.stopped_until, worker.continued = 0.0, now
                for request in self._running.values():
                    if worker in request.workers:
                        request.struck = now

    def _collect(self) -> None:
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(by_pipe), timeout=_POLL_S):
            self._take(by_pipe[pipe], pipe.recv())
        self._forget_ended()

    def _take(self, worker: Worker, ended: Ended) -> None:
        request = self._running.get(ended.room)
        if request is None:
            return
        if worker in request.waiting:
            request.waiting.remove(worker)
        if ended.reason.isupper() or (not ended.is_whole and request.struck is None):
            self._complain(request, f"{worker.main.__name__}: {ended.reason or 'failed without a reason'}")
        if worker in self._free:
            self._free[worker] |= set(request.job.target)
            if ended.is_whole:
                self.report.whole += 1
            else:
                self.report.failed += 1

    def _forget_ended(self) -> None:
        for room in [room for room, request in self._running.items() if not request.waiting]:
            del self._running[room]

    def _check_for_hangs(self, now: float) -> None:
        if self._are_stopped():
            return
        for request in list(self._running.values()):
            if now - max(request.opened, request.struck or 0) > LIMIT_S:
                names = ", ".join(worker.main.__name__ for worker in request.waiting)
                self._complain(request, f"hangs on {names}")
                request.waiting.clear()

    def _complain(self, request: Request, what: str) -> None:
        struck = "never struck" if request.struck is None else f"struck after {request.struck - request.opened:.1f} s"
        self.report.problems.append(f"request {request.job.room}, {struck}: {what}")

    def _check_what_is_left(self) -> None:
        for worker in self._workers:
            left, begun = worker.left(), worker.begun
            assert begun is not None
            names = f"{worker.main.__name__} {worker.seed}"
            if left.rooms:
                self.report.problems.append(f"{names} keeps {left.rooms} rooms")
            if left.threads > begun.threads + 4:
                self.report.problems.append(f"{names} has {left.threads} threads, {begun.threads} at its start")
            # Two connections to each of the others, with what ZMQ needs to watch them.
            if left.files > begun.files + 10 * NUM_PREFILL:
                self.report.problems.append(f"{names} has {left.files} open files, {begun.files} at its start")
            if left.mib > begun.mib + MAX_GROWTH_MIB:
                self.report.problems.append(f"{names} has grown from {begun.mib:.0f} to {left.mib:.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--fault-every", type=float, default=2.5, metavar="SECONDS")
    parser.add_argument("--pause", type=float, default=0.2, metavar="SECONDS", help="between requests")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = Soak(args.requests, args.fault_every, args.pause, args.seed).run()
    faults = ", ".join(f"{number} {what}" for what, number in sorted(report.faults.items()))
    print(
        f"{report.requests} requests in {report.seconds:.0f} s: {report.whole} whole, {report.failed} failed; {faults}"
    )
    for problem in report.problems:
        print(problem, file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
