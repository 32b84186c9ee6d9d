"""Every process of a cluster, killed, stopped or cut off at every stage of a request: a line for each case.

    SGLANG_APB_MODEL=MODEL_DIR python tests/fault_matrix.py --faults STOP KILL
    SGLANG_APB_MODEL=MODEL_DIR python tests/fault_matrix.py --faults CUT

MODEL_DIR: SmolLM2's; some of its layers are served. Two clusters run: prefill of two APB ranks (A), decode (D1) and
router, and prefill of one rank (B), decode (D2) and router. The struck request always goes from A to D1. It is sent to
both servers as the router sends it, so that each one's answer is seen; for a router that is struck, through it.

With CUT, D1 is on another machine, as far as the network can tell, and the link to it delays and loses packets. Then
the link is cut: for a prefill rank and for the router what goes to or comes from it, for decode everything.

Status 1 if a case breaks a promise: noticed in time; the error names the cause; the pages are free at once; requests
that do not need the struck process are answered rightly; served again when it is back; nothing is left at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import psutil
import requests
import tiny_models
from asking import ALL_PASSED, prompts
from conftest import FLOAT32
from far_cluster import IN_NAMESPACE, spread
from halves import (
    HANGS_AFTER_S,
    Half,
    Innocents,
    Server,
    Struck,
    ask_half,
    body,
    end_hog,
    server_of,
    start_hog,
    tcp_received,
)
from lossy_link import HERE, THERE, Link
from soak_servers import left_behind, shared_memory
from striking import CUT, FAULTS, KILL, STOP, TARGETS, Striker
from test_server_faults import PROMISE_S, schedulers
from transfer_peers import wait_for

from sglang_apb.commands.servers import HOST, LocalCluster
from sglang_apb.transfer.protocol import keys

FIRST_PORT = 31800
NUM_LAYERS = 12
SHORT, LONG = 600, 2500
# Decode's pool: holds the long prompt, or one that may grow by HOG_TOKENS, but not both.
DECODE_TOKENS, HOG_TOKENS = 5200, 3000
TRANSFERRED_LAYERS = 3
BYTES_A_LAYER = LONG * 2 * 3 * 64 * 4  # K and V, 3 heads of 64 in float32
FEW, MANY = 8, 160
STAGES = ("bootstrapping", "waiting", "transferring", "done")
FREED_S = 1.5
# SGLang looks every 4 s whether a client is still there, and counts anew every 40 steps of decode, 5 s on a slow
# machine. A batch that is being computed is computed to its end.
CLIENT_GONE_S = 15.0
BATCH_S = 10.0
DELAY_S, LOSS = 0.005, 0.01  # of packets on the link to D1
AGAIN_S = 15.0
ENDED_S = 10.0  # processes that were killed have gigabytes to give back


@dataclass
class Row:
    """What one case showed. Seconds count from the fault, those until served again from when the process was back."""

    cell: str
    noticed: float | None = None
    got: str = ""
    own: str = "-"
    num_innocent: int = 0
    pages: str = ""
    again: float | None = None
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        noticed, again = ("-" if s is None else f"{s:.1f}" for s in (self.noticed, self.again))
        result = "; ".join(self.problems) or "ok"
        return " | ".join(
            (self.cell, noticed, self.got[:110], self.own[:60], f"{self.num_innocent} right", self.pages, again, result)
        )


HEADER = (
    "target | fault | stage | noticed s | survivor's half of the struck request got | the struck one's own half | "
    "innocent | slots in use before, struck, after | served again s | result"
)


class Matrix:
    def __init__(self, model: Path, first: LocalCluster, second: LocalCluster, link: Link | None) -> None:
        self._cluster, self._link = first, link
        prefill_host, far_host = (HERE, THERE) if link else (HOST, HOST)
        self._a, self._d1 = server_of(first, 1, "A", prefill_host), server_of(first, 2, "D1", far_host)
        self._b, self._d2 = server_of(second, 1, "B", prefill_host), server_of(second, 2, "D2")
        self._servers = (self._a, self._b, self._d1, self._d2)
        self._striker = Striker(first, link, {"prefill": self._a.url, "decode": self._d1.url, "router": first.url})
        self._short, self._long = prompts(model, (SHORT, LONG))
        self._random = random.Random(0)
        self._room = 0
        self._wanted = {
            (len(prompt), number): self._reference(prompt, number)
            for prompt, number in ((self._short, FEW), (self._short, MANY), (self._long, FEW))
        }

    def run(self, target: str, fault: str, stage: str) -> Row:
        row = Row(f"{target} | {fault} | {stage}")
        if stage == "waiting":
            self._start_hog()
        innocents = Innocents(partial(self._outcome, *self._innocent_pair(target)))
        try:
            self._strike(row, target, fault, stage, innocents)
        except (AssertionError, requests.RequestException) as error:
            row.problems.append(f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            self._striker.bring_back()
            if row.problems:
                self._abort_all()
            innocents.stop()
            self._end_hog()
        if not row.problems:
            self._check_after(row)
        return row

    def _strike(self, row: Row, target: str, fault: str, stage: str, innocents: Innocents) -> None:
        survivors = {"p": [self._d1], "d": [self._a], "r": [self._a, self._d1]}[target[0]]
        before = [server.used() for server in survivors]
        struck = self._ask_until(target, stage)
        peers = survivors[0].num_peers()
        at_strike = [server.used() for server in survivors]
        started = time.monotonic()
        self._striker.strike(target, fault)
        if (target, stage) == ("decode", "bootstrapping"):
            struck.prefill = ask_half(self._a, self._a, self._long, FEW, self._room)
        if target == "router":
            self._check_router(row, struck, fault, stage, started)
        else:
            self._check_noticed(row, struck, target, stage, started, lambda: survivors[0].num_peers() < peers)
        free = self._are_free(survivors) or (innocents.have_one_more() and self._are_free(survivors))
        after = [server.used() for server in survivors]
        row.pages = f"{before}, {at_strike}, {after}"
        innocents.stop()
        row.num_innocent = innocents.num_right
        row.problems += [] if free else [f"pages are not free: {after}"]
        row.problems += innocents.problems
        if fault == KILL:
            self._end_hog()  # it takes half of the CPUs, with which a server starts
        self._striker.bring_back()
        self._end_hog()
        self._check_again(row, target)
        self._check_own(row, struck, target, fault, stage)

    def _check_noticed(
        self, row: Row, struck: Struck, target: str, stage: str, started: float, has_fewer: Callable[[], bool]
    ) -> None:
        """By the count of peers, and by what the half on the other side ends with."""
        surviving = struck.decode if target.startswith("prefill") else struck.prefill
        assert surviving is not None
        if not wait_for(lambda: _ended_badly(surviving) or has_fewer(), PROMISE_S):
            row.problems.append(f"not noticed in {PROMISE_S} s")
        row.noticed = time.monotonic() - started
        surviving.join(HANGS_AFTER_S)
        wanted = struck.wanted[:1] if surviving is struck.prefill else struck.wanted
        row.got = f"{surviving.outcome(wanted)} after {surviving.ended - started:.1f} s"
        limit = PROMISE_S + (BATCH_S if (target, stage) == ("decode", "transferring") else 0.0)
        if stage == "done":
            if not row.got.startswith("right"):
                row.problems.append("the KV was there, and yet the answer is not right")
        elif "Lost the connection to" not in row.got:
            row.problems.append(f"the error does not name the cause: {surviving.text}")
        elif surviving.ended - started > limit:
            row.problems.append(f"the error took more than {limit} s")

    def _check_router(self, row: Row, struck: Struck, fault: str, stage: str, started: float) -> None:
        """One that is stopped or cut off keeps its connections: what servers end, the client is told later."""
        left = 1 if stage == "waiting" else 0  # the hog
        if fault == KILL:
            # A server counts anew with each batch: one more request makes it do so.
            gone = wait_for(lambda: self._is_right(self._a, self._d1) and self._num_left() <= left, CLIENT_GONE_S)
            if not gone:
                left_at = ", ".join(f"{server.name} {server.num_requests()}" for server in (self._a, self._d1))
                row.problems.append(f"requests of a router that is gone: {left_at}, of which {left} may be")
            row.noticed = time.monotonic() - started
            row.got = struck.decode.outcome(struck.wanted)
            return
        self._end_hog()
        if not wait_for(lambda: self._num_left() == 0, 60):
            row.problems.append(f"{self._num_left()} requests do not end")
        row.got = "waits"

    def _check_own(self, row: Row, struck: Struck, target: str, fault: str, stage: str) -> None:
        """What the struck process itself says, or its client sees, once it is back."""
        own = struck.prefill if target.startswith("prefill") else struck.decode
        if own is None:
            return
        own.join(HANGS_AFTER_S)
        if target.startswith("prefill") and stage == "done":
            row.own = "answered before"
            return
        row.own = own.outcome(struck.wanted)
        stays_right = fault != KILL and (target == "router" or stage == "done")
        if row.own == "hangs" or (row.own == "right") != stays_right or row.own.startswith("wrong"):
            row.problems.append("the struck one's half did not end as it should")

    def _check_again(self, row: Row, target: str) -> None:
        started = time.monotonic()
        tried = self._is_right_by_router if target == "router" else partial(self._is_right, self._a, self._d1)
        if not wait_for(tried, AGAIN_S):
            row.problems.append(f"not served again in {AGAIN_S} s")
        row.again = time.monotonic() - started

    def _are_free(self, survivors: list[Server]) -> bool:
        """SGLang counts with each batch: a server without one says what was."""
        return wait_for(lambda: all(server.used() < LONG for server in survivors), FREED_S)

    def _check_after(self, row: Row) -> None:
        for server in self._servers:
            if not wait_for(lambda server=server: server.used() + server.num_requests() == 0, 10):
                row.problems.append(f"{server.name} keeps {server.used()} slots, {server.num_requests()} requests")

    def _ask_until(self, target: str, stage: str) -> Struck:
        """Returns when the struck request has come to the stage."""
        self._room = self._random.getrandbits(62)
        prompt, number = (self._short, MANY) if stage == "done" else (self._long, FEW)
        wanted = self._wanted[len(prompt), number]
        received = self._received()
        if target == "router":
            struck = Struck(Half(self._cluster.url, body(prompt, number)), wanted)
        else:
            struck = Struck(ask_half(self._d1, self._a, prompt, number, self._room), wanted)
            if stage != "bootstrapping":
                struck.prefill = ask_half(self._a, self._a, prompt, number, self._room)
        reached: dict[str, Callable[[], bool]] = {
            "bootstrapping": struck.decode.is_alive,
            "waiting": lambda: self._d1.num_requests() > 1 and self._d1.loads()["num_waiting_reqs"] > 0,
            "transferring": lambda: self._received() - received > TRANSFERRED_LAYERS * BYTES_A_LAYER,
            "done": lambda: self._is_done(struck),
        }
        assert wait_for(reached[stage], 60), f"did not come to the stage {stage}: {struck.decode.text[:200]}"
        if stage in ("waiting", "bootstrapping"):
            time.sleep(0.05 if (target, stage) == ("router", "bootstrapping") else 1)
        if stage == "waiting" or (stage == "bootstrapping" and target != "router"):
            assert self._received() - received < BYTES_A_LAYER, "did not wait"
        assert struck.decode.is_alive(), f"ended before the signal: {struck.decode.text[:200]}"
        return struck

    def _is_done(self, struck: Struck) -> bool:
        """A prefill server answers when the KV has arrived; behind a router only decode's batch tells."""
        if struck.prefill is not None:
            return not struck.prefill.is_alive()
        return bool(self._d1.loads()["num_running_reqs"])

    def _received(self) -> int:
        """Bytes that D1 was sent by A's ranks."""
        (decode,) = schedulers(self._cluster, "decode")
        return tcp_received(decode, schedulers(self._cluster, "prefill"), IN_NAMESPACE if self._link else ())

    def _num_left(self) -> int:
        return self._a.num_requests() + self._d1.num_requests()

    def _pair(self, prefill: Server, decode: Server, prompt: list[int], number: int) -> tuple[Half, Half]:
        room = self._random.getrandbits(62)
        ask = partial(ask_half, prefill=prefill, prompt=prompt, num_tokens=number, room=room)
        return ask(decode), ask(prefill)

    def _reference(self, prompt: list[int], number: int) -> tuple[int, ...]:
        """B's answer, which A has to agree with."""
        answers = []
        for prefill in (self._b, self._a):
            pair = self._pair(prefill, self._d1, prompt, number)
            for half in pair:
                half.join()
            assert pair[0].tokens is not None, pair[0].text
            answers.append(pair[0].tokens)
        assert answers[0] == answers[1], "one rank and two do not answer alike"
        return answers[0]

    def _outcome(self, prefill: Server, decode: Server) -> str:
        pair = self._pair(prefill, decode, self._short, FEW)
        for half in pair:
            half.join(HANGS_AFTER_S)
        return pair[0].outcome(self._wanted[SHORT, FEW])

    def _is_right(self, prefill: Server, decode: Server) -> bool:
        return self._outcome(prefill, decode) == "right"

    def _is_right_by_router(self) -> bool:
        half = Half(self._cluster.url, body(self._short, FEW))
        half.join(HANGS_AFTER_S)
        return half.outcome(self._wanted[SHORT, FEW]) == "right"

    def _innocent_pair(self, target: str) -> tuple[Server, Server]:
        """Servers that need not the struck process, one of them a survivor of it where that disturbs no count."""
        if target == "router":
            return self._b, self._d2
        return (self._b, self._d1) if target.startswith("prefill") else (self._a, self._d2)

    def _start_hog(self) -> None:
        """Takes so much of D1's memory that the long prompt has to wait."""
        start_hog(self._d1, self._b, self._short, HOG_TOKENS, self._random.getrandbits(62))

    def _end_hog(self) -> None:
        """Also where there is none, or D1 is gone."""
        with contextlib.suppress(requests.RequestException):
            end_hog(self._d1)

    def _abort_all(self) -> None:
        """So that what one case left is not in the next one's way."""
        for server in self._servers:
            with contextlib.suppress(requests.RequestException):
                requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=10)


def _listened_on() -> list[int]:
    ports = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return sorted(ports & set(range(FIRST_PORT, FIRST_PORT + 20)))


def _ended_badly(half: Half) -> bool:
    return not half.is_alive() and half.tokens is None


def _start(model: Path, port: int, log_dir: Path, num_ranks: int) -> LocalCluster:
    return LocalCluster(
        str(model),
        port=port,
        log_dir=log_dir,
        sp_size=num_ranks,
        arguments=[*FLOAT32, "--enable-metrics", "--load-snapshot-publish-interval", "1"],
        prefill_arguments=["--prefill-backend-config", ALL_PASSED],
        decode_arguments=["--max-total-tokens", str(DECODE_TOKENS)],
    )


def _run_all(model: Path, folder: Path, cells: list[tuple[str, str, str]], until: float) -> list[Row]:
    """Starts no case after `until`, a time of `monotonic`."""
    clusters = [_start(model, FIRST_PORT + 10 * i, folder / f"logs{i}", 2 - i) for i in range(2)]
    with ExitStack() as stack:
        link = None
        if any(fault == CUT for _, fault, _ in cells):
            link = stack.enter_context(Link(DELAY_S, LOSS))
            keys.create(folder, ["prefill", "decode"])
            clusters = [spread(cluster, folder, decode_is_far=i == 0) for i, cluster in enumerate(clusters)]
        for cluster in clusters:
            stack.enter_context(cluster)
        for cluster in clusters:
            cluster.wait_ready(timeout=600)
        matrix = Matrix(model, *clusters, link)
        print(HEADER, flush=True)
        rows = []
        for cell in cells:
            if time.monotonic() < until:
                rows.append(matrix.run(*cell))
                print(rows[-1].line(), flush=True)
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=(STOP, KILL))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--within", type=float, default=7200, metavar="SECONDS", help="then no other case begins")
    args = parser.parse_args()
    before = shared_memory()
    cells = [(target, fault, stage) for fault, stage, target in product(args.faults, args.stages, args.targets)]
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.cut(Path(os.environ.get("SGLANG_APB_MODEL", ".demo/model")), NUM_LAYERS, Path(folder))
        rows = _run_all(model, Path(folder), cells, time.monotonic() + args.within)
    left = left_behind(before)
    wait_for(lambda: not _listened_on(), ENDED_S)
    left += [f"somebody listens on {port}" for port in _listened_on()]
    num_failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} of {len(cells)} cases run, {num_failed} with a problem; left: {'; '.join(left) or 'nothing'}")
    return 1 if num_failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
