"""Requests of all shapes to real servers: to one server, through the router, and straight to prefill and decode.

    python tests/fuzz_servers.py MODEL_DIR --requests 20000 [--first-seed K]

MODEL_DIR: SmolLM2's, whose tokenizer a tiny random model gets. A seed makes a hundred requests (`request_shapes.py`),
of which those for both halves count twice; after them every entrance is asked what it was asked first, and must answer
as then. Ends with status 1 when a server ended, a request hung, an honest answer changed, or requests, KV slots,
threads or processes are left; the seed is printed, with which the next run may begin.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests
import tiny_models
from asking import GREEDY, generate
from conftest import cluster, server
from halves import server_of
from request_shapes import LONG, VOCAB_SIZE, Shape, Shapes
from transfer_peers import wait_for

from sglang_apb.commands.servers import HOST, LocalCluster, LocalService, ServiceError

SHAPES_A_SEED = 100
NUM_AT_ONCE = 6
HANGS_AFTER_S = 120.0
# A half whose other half was not asked waits for it, so its client leaves.
ONE_HALF_LEAVES_S = 1.0
# By then a half has given up what its other half was not asked for.
LEFT_AFTER_S = 60.0
# A client that waits for a half whose other half was not asked: not for 30 s each time.
CONTACT = ("--kv-transfer-config", json.dumps({"contact_seconds": 3}))
SPARSE = ("--prefill-backend-config", json.dumps({"min_tokens": LONG // 2, "block": 128, "anchor": 64, "passing": 16}))
HONEST = [[(5 + i * 37) % VOCAB_SIZE for i in range(length)] for length in (40, LONG)]
# Pools of SGLang's and of ours, which start a thread when all others have work, are not full after a seed.
_SPARE = {"threads of the single server": 16, "threads of the cluster": 40}
_ENTRANCES = ("single", "single", "router", "router", "halves", "halves", "half")


@dataclass
class Outcome:
    """`hung`: what had no answer in time."""

    answers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    hung: list[str] = field(default_factory=list)


class Fuzz:
    def __init__(self, single: LocalService, pair: LocalCluster, outcome: Outcome) -> None:
        self._single, self._pair = single, pair
        self._prefill, self._decode = server_of(pair, 1, "prefill"), server_of(pair, 2, "decode")
        self._shapes = Shapes(requests.get(f"{single.url}/openapi.json", timeout=30).json())
        self._wanted = self._honest()
        self.outcome = outcome

    def run(self, number: int) -> None:
        """The requests of seed `number`, then the honest ones. Raises AssertionError."""
        draw = random.Random(number)
        shapes = self._shapes.make(number, SHAPES_A_SEED)
        with ThreadPoolExecutor(NUM_AT_ONCE) as clients:
            asked = [clients.submit(self._ask, shape, draw.choice(_ENTRANCES), draw.random()) for shape in shapes]
            for one in asked:
                one.result()
        for service in (self._single, self._pair):
            service.check()
        assert not self.outcome.hung, f"no answer after {HANGS_AFTER_S:.0f} s: {self.outcome.hung[0]}"
        found = self._honest()
        assert found == self._wanted, f"honest requests are answered {found}, not {self._wanted}"

    def check_nothing_is_left(self, before: dict[str, int]) -> None:
        """Of requests; of threads and processes, more than before."""
        for each in (server_of(self._single, 0, "single server"), self._prefill, self._decode):
            for what, count in (("requests", each.num_requests), ("KV slots", each.used)):
                assert wait_for(lambda count=count: count() == 0, LEFT_AFTER_S), f"{each.name} keeps {count()} {what}"
        after = self.sizes()
        more = {name: (size, after[name]) for name, size in before.items() if after[name] > size + _SPARE.get(name, 0)}
        assert not more, f"more threads or processes than before: {more}"

    def sizes(self) -> dict[str, int]:
        """Processes and threads of each service."""
        found = {}
        for name, service in (("single server", self._single), ("cluster", self._pair)):
            processes = [one for group in service.groups for one in psutil.Process(group.pid).children(recursive=True)]
            found[f"processes of the {name}"] = len(processes)
            found[f"threads of the {name}"] = sum(_num_threads(process) for process in processes)
        return found

    def _honest(self) -> list[tuple[int, ...]]:
        urls = (self._single.url, self._pair.url)
        return [generate(url, ids, sampling_params=GREEDY).token_ids for url in urls for ids in HONEST]

    def _ask(self, shape: Shape, entrance: str, which: float) -> None:
        body, leaves_after_s = shape.body, shape.leaves_after_s
        if entrance in ("single", "router"):
            url = self._single.url if entrance == "single" else self._pair.url
            self._post(entrance, url, shape.path, body, leaves_after_s)
            return
        if isinstance(body, dict):
            body = body | self._bootstrap(which)
        if entrance == "half":
            half = self._prefill if which < 0.5 else self._decode
            self._post(half.name, half.url, shape.path, body, leaves_after_s or ONE_HALF_LEAVES_S)
            return
        with ThreadPoolExecutor(2) as both:
            for half in (self._prefill, self._decode):
                both.submit(self._post, half.name, half.url, shape.path, body, leaves_after_s)

    def _bootstrap(self, which: float) -> dict[str, Any]:
        room = int(which * 2**62) + 1
        odd = {
            0: {"bootstrap_room": -1},
            1: {"bootstrap_room": 7},
            2: {"bootstrap_host": "\0"},
            3: {"bootstrap_port": 1},
            4: {"bootstrap_host": None},
        }
        fields = {"bootstrap_host": HOST, "bootstrap_port": self._prefill.bootstrap_port, "bootstrap_room": room}
        return fields | odd.get(room % 50, {})

    def _post(self, name: str, url: str, path: str, body: Any, leaves_after_s: float | None) -> None:
        started = time.monotonic()
        try:
            data = json.dumps(body)
            response = requests.post(
                f"{url}{path}",
                data=data,
                headers={"Content-Type": "application/json"},
                timeout=(HANGS_AFTER_S, leaves_after_s or HANGS_AFTER_S),
            )
        except requests.Timeout:
            if leaves_after_s is None:
                self.outcome.hung.append(f"{name} {path} {data[:2000]}")
            self.outcome.answers[f"{name}: the client left"] += 1
        except requests.RequestException as error:
            self.outcome.answers[f"{name}: {type(error).__name__} after {time.monotonic() - started:.0f} s"] += 1
        else:
            self.outcome.answers[f"{name}: {response.status_code}"] += 1
            if response.status_code >= requests.codes.server_error:
                self.outcome.errors[f"{name} {path}: {response.text[:300]}"] += 1


def _num_threads(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.num_threads())
    return 0


@contextlib.contextmanager
def fuzzed(smollm2: Path, log_dir: Path, outcome: Outcome) -> Iterator[Fuzz]:
    model = tiny_models.make("LlamaForCausalLM", smollm2, log_dir / "model")
    single = server(model, log_dir / "single", "--prefill-backend", "apb", *SPARSE)
    pair = cluster(model, log_dir / "pair", 2, *SPARSE, arguments=CONTACT)
    with single, pair:
        for service in (single, pair):
            service.wait_ready(timeout=600)
        yield Fuzz(single, pair, outcome)


def fuzz(
    smollm2: Path, log_dir: Path, first_seed: int, num_requests: int, report: Callable[[str], None], outcome: Outcome
) -> None:
    """Counts in `outcome`. Raises AssertionError, or ServiceError when a server has ended."""
    with fuzzed(smollm2, log_dir, outcome) as servers:
        before: dict[str, int] = {}
        seeds = itertools.count(first_seed)
        while outcome.answers.total() < num_requests:
            number = next(seeds)
            report(f"seed {number}: {outcome.answers.total()} requests so far")
            servers.run(number)
            before = before or servers.sizes()  # the first requests start threads
        servers.check_nothing_is_left(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="keeps the servers' logs")
    args = parser.parse_args()
    started = time.monotonic()
    outcome, fault = Outcome(), ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            log_dir, report = args.log_dir or Path(folder), partial(print, flush=True)
            fuzz(args.model, log_dir, args.first_seed, args.requests, report, outcome)
        except (AssertionError, ServiceError) as error:
            fault = str(error)
    for error, number in outcome.errors.most_common():
        print(f"{number} times {error}")
    for answer, number in sorted(outcome.answers.items()):
        print(f"{number:6} {answer}")
    print(f"{outcome.answers.total()} requests in {time.monotonic() - started:.0f} s, from seed {args.first_seed} on")
    print(fault or "every server lives, every honest answer was as at first, nothing is left")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
