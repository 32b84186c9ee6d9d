"""Prompts with known answers to two prefill and two decode servers, of which one after the other is killed or stopped.

    python tests/soak_servers.py MODEL_DIR --requests 500

MODEL_DIR: SmolLM2's; three of its layers are served. A server that was killed takes half a minute to be back; meanwhile
the schedulers of others are stopped for some seconds. Ends with status 1 when an answer is wrong, a request hangs or
fails although no server was struck, or when something is left: KV pages that are not free, processes, shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests
import tiny_models
from asking import generate, prompts
from striking import RESTART_S
from test_server_faults import schedulers_of
from test_server_shapes import several_servers
from transfer_peers import wait_for

from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import HOST, LocalService, is_up

LENGTHS = (150, 300, 600, 900, 1300)
NUM_AT_ONCE = 4
HANGS_AFTER_S = 90.0
STOPPED_S = (1.0, 6.0)
SHARE_KILLED = 0.3
# Nobody tells prefill that a decode server is down, and the router waits for both, and asks again: not for 30 s each.
CONTACT = ("--kv-transfer-config", '{"contact_seconds": 5}')
SAMPLING = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}


class Soak:
    def __init__(self, service: LocalService, asked: list[list[int]], seed: int) -> None:
        self._service, self._asked = service, asked
        self._random = random.Random(seed)
        self._servers = [group for group in service.groups if group.name != "router"]
        self._last_fault = 0.0
        self._ending = threading.Event()
        self._wanted: list[tuple[int, ...]] = []
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.slowest_s = 0.0

    def run(self, num_requests: int, fault_every_s: float) -> None:
        self._wanted = [self._tokens(prompt) for prompt in self._asked]
        striker = threading.Thread(target=self._strike_again_and_again, args=(fault_every_s,))
        striker.start()
        try:
            with ThreadPoolExecutor(NUM_AT_ONCE) as clients:
                list(clients.map(self._ask, range(num_requests)))
        finally:
            self._ending.set()
            striker.join()
        self._ask_until_both_sides_answer()
        self._check_pages()

    def _tokens(self, prompt: list[int]) -> tuple[int, ...]:
        return generate(self._service.url, prompt, sampling_params=SAMPLING).token_ids

    def _ask(self, number: int) -> None:
        which = number % len(self._asked)
        body = {"input_ids": self._asked[which], "sampling_params": SAMPLING, "rid": f"soak-{number}"}
        started = time.monotonic()
        try:
            response = self._post(body)
        except requests.Timeout:
            self.problems.append(f"request {number} has no answer after {HANGS_AFTER_S:.0f} s")
            self.outcomes["hung"] += 1
            return
        except requests.RequestException as error:
            self.problems.append(f"request {number}: the router did not answer: {error}")
            self.outcomes["no answer"] += 1
            return
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        if not response.ok:
            self.outcomes["failed"] += 1
            if self._last_fault < started - HANGS_AFTER_S:
                self.problems.append(f"request {number} failed although no server was down: {response.text[:300]}")
        elif tuple(response.json()["output_ids"]) != self._wanted[which]:
            self.outcomes["wrong"] += 1
            self.problems.append(f"request {number} got {response.json()['output_ids']}, not {self._wanted[which]}")
        else:
            self.outcomes["right"] += 1

    def _post(self, body: dict[str, Any]) -> requests.Response:
        """Asks again when the router has nobody to ask, as it says, and its clients are meant to."""
        until = time.monotonic() + HANGS_AFTER_S
        while True:
            response = requests.post(f"{self._service.url}/generate", json=body, timeout=HANGS_AFTER_S)
            if response.status_code != requests.codes.unavailable or time.monotonic() > until:
                return response
            self.outcomes["refused by the router and asked again"] += 1
            time.sleep(1)

    def _strike_again_and_again(self, every_s: float) -> None:
        """At most one server is down at a time, and at most one other is stopped."""
        restart = threading.Thread()
        down: ProcessGroup | None = None
        while not self._ending.wait(every_s * self._random.uniform(0.5, 1.5)):
            is_down = restart.is_alive()
            group = self._random.choice([group for group in self._servers if not (is_down and group is down)])
            self._last_fault = time.monotonic()
            if is_down or self._random.random() > SHARE_KILLED:
                self._stop_for_a_while(group)
            else:
                down, restart = group, threading.Thread(target=self._kill_and_restart, args=(group,))
                restart.start()
        if down is not None:
            restart.join()

    def _stop_for_a_while(self, group: ProcessGroup) -> None:
        self.faults[f"{group.name} stopped"] += 1
        stopped = schedulers_of(group)
        for process in stopped:
            process.suspend()
        self._ending.wait(self._random.uniform(*STOPPED_S))
        for process in stopped:
            process.resume()
        self._last_fault = time.monotonic()

    def _kill_and_restart(self, group: ProcessGroup) -> None:
        whole = self._random.random() < 0.5
        self.faults[f"{group.name} {'killed' if whole else 'lost its scheduler'}"] += 1
        for process in _processes(group) if whole else schedulers_of(group):
            process.kill()
        group.stop()
        group.start()
        if not wait_for(partial(is_up, _url(group)), RESTART_S):
            self.problems.append(f"{group.name} did not start again; log: {group.log_path}")
        self._last_fault = time.monotonic()

    def _ask_until_both_sides_answer(self) -> None:
        """The router takes a while to notice that a server is back."""
        for number, prompt in enumerate(self._asked):
            if not wait_for(lambda prompt=prompt, number=number: self._is_right(prompt, number), 60):
                self.problems.append(f"prompt {number} has no right answer after the last restart")

    def _is_right(self, prompt: list[int], number: int) -> bool:
        try:
            return self._tokens(prompt) == self._wanted[number]
        except (AssertionError, requests.RequestException):
            return False

    def _check_pages(self) -> None:
        """Once nothing is asked any more, every page is free."""
        for group in self._servers:
            if not wait_for(lambda group=group: _used_tokens(group) == 0, 30):
                self.problems.append(f"{group.name} keeps {_used_tokens(group):.0f} KV slots")


def _processes(group: ProcessGroup) -> list[psutil.Process]:
    (server,) = psutil.Process(group.pid).children()
    return [server, *server.children(recursive=True)]


def _url(group: ProcessGroup) -> str:
    return f"http://{HOST}:{group.command[group.command.index('--port') + 1]}"


def _used_tokens(group: ProcessGroup) -> float:
    metrics = requests.get(f"{_url(group)}/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(r"^sglang:num_used_tokens\{.*\} (\S+)$", metrics, re.MULTILINE))


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def left_behind(shared_before: set[str]) -> list[str]:
    """Processes that this one started, and shared memory that came meanwhile and that no process maps, in words."""
    left = []
    if children := [child for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]:
        left.append(f"processes are left: {[child.name() for child in children]}")
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            mapped |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    if shared := shared_memory() - shared_before - mapped:
        left.append(f"shared memory is left: {sorted(shared)}")
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--fault-every", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="keeps the servers' logs")
    args = parser.parse_args()
    started, before = time.monotonic(), shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.cut(args.model, 3, Path(folder))
        service = several_servers(model, args.log_dir or Path(folder) / "logs", 2, 2, "--enable-metrics", *CONTACT)
        soak = Soak(service, prompts(model, LENGTHS), args.seed)
        with service:
            service.wait_ready(timeout=600)
            soak.run(args.requests, args.fault_every)
            service.check()
    soak.problems += left_behind(before)
    outcomes = ", ".join(f"{number} {what}" for what, number in soak.outcomes.most_common())
    faults = ", ".join(f"{number} times {what}" for what, number in sorted(soak.faults.items()))
    print(f"{args.requests} requests in {time.monotonic() - started:.0f} s: {outcomes}; {faults}")
    print(f"slowest answer: {soak.slowest_s:.1f} s")
    for problem in soak.problems:
        print(problem, file=sys.stderr)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
