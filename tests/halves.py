"""Prefill and decode servers that are asked one by one for their halves of a request, as SGLang's router asks them."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import requests
from test_server_faults import value
from transfer_peers import wait_for

from sglang_apb.commands.servers import HOST, LocalCluster

HANGS_AFTER_S = 60.0
_HOG = "hog"
_CAUSE = re.compile(r"Lost the connection[^.]*(?:\.\d[^.]*)*\.|The request was aborted[^.]*\.|Read\w*|Connection\w*")


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    bootstrap_port: int = 0
    host: str = HOST

    def loads(self) -> dict[str, Any]:
        load: dict[str, Any] = requests.get(f"{self.url}/v1/loads", timeout=10).json()["loads"][0]
        return load

    def used(self) -> int:
        return int(self.loads()["num_used_tokens"])

    def num_requests(self) -> int:
        load = self.loads()
        inflight = (load.get("disaggregation") or {}).get("prefill_inflight_queue_reqs", 0)
        return int(load["num_running_reqs"] + load["num_waiting_reqs"] + inflight)

    def num_peers(self) -> float:
        return value(requests.get(f"{self.url}/metrics", timeout=10).text, "kv_peers")


def server_of(cluster: LocalCluster, offset: int, name: str, host: str = HOST) -> Server:
    """LocalCluster's ports follow the router's: prefill (1), decode (2), bootstrap."""
    port = int(cluster.url.rpartition(":")[2])
    return Server(name, f"http://{host}:{port + offset}", port + 3, host)


class Half(threading.Thread):
    """What one server, or a router, is asked, and what came of it."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.ended, self.text = 0.0, ""
        self.tokens: tuple[int, ...] | None = None
        self.start()

    def run(self) -> None:
        try:
            response = requests.post(f"{self._url}/generate", json=self._body, timeout=300)
            self.text = response.text
            self.tokens = tuple(response.json()["output_ids"]) if response.ok else None
        except requests.RequestException as error:
            self.text = type(error).__name__
        self.ended = time.monotonic()

    def outcome(self, wanted: tuple[int, ...]) -> str:
        if self.is_alive():
            return "hangs"
        if self.tokens is None:
            return _CAUSE.findall(self.text)[-1] if _CAUSE.search(self.text) else self.text
        return "right" if self.tokens == wanted else f"wrong: {self.tokens}"


@dataclass
class Struck:
    """The request that is struck: `prefill` is None where it was not asked, and for one that went through a router."""

    decode: Half
    wanted: tuple[int, ...]
    prefill: Half | None = None


class Innocents(threading.Thread):
    """One request after the other that has nothing to do with the struck process."""

    def __init__(self, ask: Callable[[], str]) -> None:
        """`ask` returns what came of it: "right", or else."""
        super().__init__(daemon=True)
        self._ask = ask
        self._ending = threading.Event()
        self.num_right = 0
        self.problems: list[str] = []
        self.start()

    def run(self) -> None:
        while not self._ending.is_set():
            if (outcome := self._ask()) == "right":
                self.num_right += 1
            else:
                self.problems.append(f"an innocent request: {outcome[:300]}")

    def have_one_more(self) -> bool:
        before = self.num_right
        return wait_for(lambda: self.num_right > before, 60)

    def stop(self) -> None:
        self._ending.set()
        self.join()


def ask_half(
    server: Server, prefill: Server, prompt: list[int], num_tokens: int, room: int, rid: str | None = None
) -> Half:
    """`prefill` is who prefills: `server` or the one that sends to it."""
    where = {"bootstrap_host": prefill.host, "bootstrap_port": prefill.bootstrap_port, "bootstrap_room": room}
    return Half(server.url, body(prompt, num_tokens) | where | ({"rid": rid} if rid else {}))


def start_hog(decode: Server, prefill: Server, prompt: list[int], num_tokens: int, room: int) -> Half:
    """A request that takes memory of `decode` for long; returns when it is prefilled."""
    hog = ask_half(decode, prefill, prompt, num_tokens, room, rid=_HOG)
    ask_half(prefill, prefill, prompt, num_tokens, room).join(HANGS_AFTER_S)
    return hog


def end_hog(decode: Server) -> None:
    requests.post(f"{decode.url}/abort_request", json={"rid": _HOG}, timeout=10)


def body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True},
    }


def _listening(process: psutil.Process) -> list[int]:
    return [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def tcp_received(process: psutil.Process, from_processes: list[psutil.Process], within: Sequence[str] = ()) -> int:
    """Bytes over the connections that the process has now to what the others listen on, as the kernel counts them.

    `within`: a command before that which asks, for a process in another network.
    """
    from_ports = {port for other in from_processes for port in _listening(other)}
    lines = subprocess.run([*within, "ss", "-tinpHO"], check=True, capture_output=True, text=True).stdout.splitlines()
    of_process = [line for line in lines if f"pid={process.pid}," in line]
    from_those = [line for line in of_process if int(line.split()[4].rpartition(":")[2]) in from_ports]
    return sum(int(number) for line in from_those for number in re.findall(r"bytes_received:(\d+)", line))
