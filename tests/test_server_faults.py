"""A cluster of real servers with keys, of which processes are stopped: the others go on, and it works again after."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from asking import ALL_PASSED, GREEDY, Answer, assert_ran_sparse, assert_same_tokens, generate, prompts
from conftest import cluster, running, thorough
from transfer_peers import wait_for

from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalCluster
from sglang_apb.transfer.protocol import keys

pytestmark = pytest.mark.server
PROMISE_S = 5.0


def key_config(folder: Path, name: str) -> tuple[str, str]:
    values = {"secret_key": str(folder / f"{name}.key_secret"), "peers": str(folder / "peers")}
    return "--kv-transfer-config", json.dumps(values)


def schedulers(service: LocalCluster, name: str) -> list[psutil.Process]:
    """The rank processes of a server, in the order of their ranks."""
    (group,) = [group for group in service.groups if group.name == f"{name} server"]
    return schedulers_of(group)


def schedulers_of(group: ProcessGroup) -> list[psutil.Process]:
    found = [
        p for p in psutil.Process(group.pid).children(recursive=True) if "sglang::scheduler" in p.name() + _title(p)
    ]
    return sorted(found, key=_title)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


class Request(threading.Thread):
    """One request in the background."""

    def __init__(self, url: str, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.url, self.prompt = url, prompt
        self.response: Any = None
        self.start()

    def run(self) -> None:
        body = {"input_ids": self.prompt, "sampling_params": GREEDY}
        self.response = requests.post(f"{self.url}/generate", json=body, timeout=120)


def log(service: LocalCluster, name: str) -> str:
    (group,) = [group for group in service.groups if group.name == f"{name} server"]
    return group.log_path.read_text(errors="replace")


@thorough
def test_stopped_processes_are_noticed_and_missed_no_longer_than_they_are_gone(
    tiny: Callable[[str], Path], log_dirs: Iterator[Path], tmp_path: Path
) -> None:
    model = tiny("LlamaForCausalLM")
    keys.create(tmp_path, ["prefill", "decode"])
    service = cluster(
        model,
        next(log_dirs),
        2,
        *("--prefill-backend-config", ALL_PASSED),
        *key_config(tmp_path, "prefill"),
        arguments=("--enable-metrics",),
        decode_arguments=key_config(tmp_path, "decode"),
    )
    short, long = prompts(model, (700, 3000))
    with running(service) as url:
        before = [generate(url, prompt) for prompt in (short, long)]
        assert_ran_sparse(before[1], 2)
        check_a_stopped_prefill_rank(service, url, long)
        check_answers(url, (short, long), before)
        check_a_stopped_decode_server(service, url, long, before[1])
        check_answers(url, (short, long), before)
        check_metrics(url)


def check_answers(url: str, asked: tuple[list[int], ...], before: list[Answer]) -> None:
    for prompt, answer in zip(asked, before, strict=True):
        assert_same_tokens(generate(url, prompt), answer)


def check_a_stopped_prefill_rank(service: LocalCluster, url: str, prompt: list[int]) -> None:
    """The decode server ends its half at once; SGLang's router then waits for what the prefill server says."""
    lost = "Lost the connection to prefill rank"
    with stopped(schedulers(service, "prefill")[1]):
        request = Request(url, prompt)
        assert wait_for(lambda: lost in log(service, "decode"), PROMISE_S + 1), "a second to get there"
        assert wait_for(lambda: '"POST /generate HTTP/1.1" 500' in log(service, "decode"), 1)
    request.join(60)
    assert not request.is_alive(), "hung"
    assert not request.response.ok and lost in request.response.text


def check_a_stopped_decode_server(service: LocalCluster, url: str, prompt: list[int], answer: Answer) -> None:
    """Prefill is in the middle of eight requests: those that it had finished, is at, and has not begun."""
    (decode,) = schedulers(service, "decode")
    lost = "Lost the connection to the decode server"
    many = [Request(url, prompt) for _ in range(8)]
    time.sleep(1)
    with stopped(decode):
        assert wait_for(lambda: lost in log(service, "prefill"), PROMISE_S)
    for request in many:
        request.join(60)
        assert not request.is_alive(), "hung"
        if request.response.ok:
            assert request.response.json()["text"] == answer.text
        else:
            assert "onnection" in request.response.text  # whichever rank missed it first


def check_metrics(url: str) -> None:
    """Of both servers, whose ports follow the router's."""
    port = int(url.rpartition(":")[2])
    prefill, decode = (requests.get(f"http://127.0.0.1:{port + offset}/metrics", timeout=10).text for offset in (1, 2))
    # A decode server that was stopped before it could say so has more than prefill knows of.
    assert 0 < value(prefill, 'kv_bytes_total{.*side="prefill"') <= value(decode, 'kv_bytes_total{.*side="decode"')
    assert 0 < value(prefill, "kv_hidden_bytes_total") <= value(prefill, "kv_bytes_total")
    for metrics in (prefill, decode):
        assert value(metrics, 'kv_transfer_failures_total{.*cause="peer lost"') > 0
        assert value(metrics, "kv_transfer_seconds_count") > 0
        assert value(metrics, "kv_peers") == 2, "one decode rank on each of two prefill ranks"


def value(metrics: str, pattern: str) -> float:
    """The sum of the metrics that match."""
    lines = [line for line in metrics.splitlines() if re.match(f"sglang_apb:{pattern}", line)]
    assert lines, f"no {pattern} among {[line for line in metrics.splitlines() if line.startswith('sglang_apb:')]}"
    return sum(float(line.split()[-1]) for line in lines)
