"""Ranks over several hosts, which are namespaces here: answers, and what becomes of everybody when one is gone."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_namespaces
import psutil
import pytest
import requests
from asking import ALL_PASSED, GREEDY, assert_ran_sparse, assert_same_tokens, generate, prompts
from conftest import FLOAT32, PLAIN_LENGTHS, Plain, thorough
from host_namespaces import Hosts
from transfer_peers import wait_for

from sglang_apb import cli
from sglang_apb.commands.polling import is_up
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import SERVER_ENV, LocalService

WHY_NOT = host_namespaces.why_not_here()
pytestmark = [pytest.mark.server, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
PORT, BOOTSTRAP, ROUTER, RANKS, KV = 30000, 30001, 30002, 25000, 25100
TRANSFER_CONFIG = json.dumps({"allow_unencrypted": True, "port": KV})
TRANSFER = ("--disaggregation-transfer-backend", "zmq", "--kv-transfer-config", TRANSFER_CONFIG)
PREFILL = (*TRANSFER, "--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(BOOTSTRAP))


def server_on(hosts: Hosts, number: int, model: Path, log_dir: Path, *arguments: str) -> ProcessGroup:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *FLOAT32]
    command += ["--host", hosts.addresses[number], "--port", str(PORT), *arguments]
    return ProcessGroup(f"host {number}", hosts.command(number, command), log_dir / f"host-{number}.log", SERVER_ENV)


def group_over(hosts: Hosts, num_hosts: int, model: Path, log_dir: Path, *arguments: str) -> list[ProcessGroup]:
    """One server with a rank on each of the first hosts."""
    first = f"{hosts.addresses[0]}:{RANKS}"
    ranks = ["--prefill-backend", "apb", "--sp-size", str(num_hosts), "--prefill-backend-config", ALL_PASSED]
    ranks += ["--nnodes", str(num_hosts), "--dist-init-addr", first, *arguments]
    return [server_on(hosts, number, model, log_dir, *ranks, "--node-rank", str(number)) for number in range(num_hosts)]


def pair_over(hosts: Hosts, model: Path, log_dir: Path, *prefill: str) -> LocalService:
    """A prefill group over the first two hosts, a decode server on the third, and the router on this machine."""
    decode_arguments = (*TRANSFER, "--disaggregation-mode", "decode")
    urls = [f"http://{address}:{PORT}" for address in hosts.addresses]
    route = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--prefill", urls[0]]
    route += [str(BOOTSTRAP), "--decode", urls[2], "--host", "127.0.0.1", "--port", str(ROUTER)]
    route += ["--prometheus-port", str(ROUTER + 1), "--disable-circuit-breaker", "--disable-retries"]
    groups = [
        *group_over(hosts, 2, model, log_dir, *PREFILL, *prefill),
        server_on(hosts, 2, model, log_dir, *decode_arguments),
        ProcessGroup("router", [*route, "--worker-startup-check-interval", "1"], log_dir / "router.log"),
    ]
    return LocalService(groups, f"http://127.0.0.1:{ROUTER}", {"router": ROUTER})


@contextlib.contextmanager
def started(groups: list[ProcessGroup], url: str) -> Iterator[None]:
    service = LocalService(groups, url, {})
    with service:
        service._wait_until(lambda: is_up(url), "starting", 300)
        yield


def listening_ports(hosts: Hosts, number: int) -> set[int]:
    connections = (each for process in hosts.processes(number) for each in process.net_connections("tcp"))
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[[int], Hosts]]:
    with contextlib.ExitStack() as stack:
        yield lambda num_hosts: stack.enter_context(Hosts(num_hosts, tmp_path))


@thorough
def test_a_prefill_group_over_two_hosts_equals_plain_sglang(
    hosts: Callable[[int], Hosts], plain: Plain, log_dirs: Iterator[Path]
) -> None:
    """KV of each host's rank goes to decode from there: each has slots for half of the longest prompt alone."""
    here = hosts(3)
    service = pair_over(here, plain.model, next(log_dirs), "--max-total-tokens", "1900")
    with service:
        service.wait_ready(300)
        for number in (0, 1):
            assert KV in listening_ports(here, number), "each host's rank listens where it was told"
        for length in PLAIN_LENGTHS[1:]:
            answer = generate(service.url, plain.prompts[length])
            assert_ran_sparse(answer, 2)
            assert_same_tokens(answer, plain.answers[length])


CLUSTER = """
model = "{model}"
keys = "{folder}/keys"
log_dir = "{folder}/logs"
arguments = {arguments}

[hosts]
{hosts}

[router]
host = "apb-host2"

[[servers]]
name = "group"
role = "prefill"
hosts = ["apb-host0", "apb-host1"]
port = 30100

[[servers]]
name = "alone"
role = "prefill"
hosts = ["apb-host2"]
port = 30200

[[servers]]
name = "decode"
role = "decode"
hosts = ["apb-host2"]
port = 30300
"""


def test_one_file_starts_each_hosts_part(
    hosts: Callable[[int], Hosts], plain: Plain, log_dirs: Iterator[Path], tmp_path: Path
) -> None:
    """With keys, a group over two hosts beside a server of one, on the third, where decode and router are."""
    here, folder = hosts(3), next(log_dirs)
    addresses = "\n".join(f'{here.name(number)} = "{address}"' for number, address in enumerate(here.addresses))
    file = tmp_path / "cluster.toml"
    arguments = json.dumps([*FLOAT32])
    text = CLUSTER.format(model=plain.model, folder=folder, arguments=arguments, hosts=addresses)
    file.write_text(f"prefill_backend_config = {json.dumps(ALL_PASSED)}\n{text}")
    assert cli.main(["cluster", "keys", str(file)]) == 0
    launch = [sys.executable, "-m", "sglang_apb.cli", "launch", "--cluster", str(file), "--host"]
    groups = [
        ProcessGroup(here.name(number), here.command(number, [*launch, here.name(number)]), folder / f"{number}.log")
        for number in range(3)
    ]
    url = f"http://{here.addresses[2]}:30000"
    with LocalService(groups, url, {}) as service:
        service._wait_until(lambda: all("READY" in group.log_tail(5) for group in groups), "starting", 300)
        assert f"READY {url}" in groups[2].log_tail(5), "where the router is, a chat has succeeded"
        prompt, wanted = plain.prompts[1300], plain.answers[1300]

        def ask(key: str) -> tuple[int, int]:
            body = {"input_ids": prompt, "sampling_params": GREEDY}
            headers = {"X-SMG-Routing-Key": key}
            answer = requests.post(f"{url}/generate", json=body, headers=headers, timeout=60).json()
            assert tuple(answer["output_ids"]) == wanted.token_ids
            return answer["meta_info"]["prefill"]["num_ranks"], answer["meta_info"]["cached_tokens"]

        def num_joined() -> int:
            return sum(worker["is_healthy"] for worker in requests.get(f"{url}/workers", timeout=5).json()["workers"])

        assert wait_for(lambda: num_joined() == 3, 20), "the router looks for servers that are not there yet every 5 s"
        documents = [f"document {number}" for number in range(4)]
        with ThreadPoolExecutor(4) as clients:  # a new key goes where least is asked
            found = list(clients.map(ask, documents))
        again = [ask(document) for document in documents]
        assert [num_ranks for num_ranks, _ in again] == [num_ranks for num_ranks, _ in found]
        assert {num_ranks for num_ranks, _ in found} == {1, 2}, "both prefill servers were asked"
        assert all(num_cached > 0 for _, num_cached in again), "a key's later questions find its cache"
        for number in range(3):
            check = [sys.executable, "-m", "sglang_apb.cli", "cluster", "check", str(file), "--connect"]
            subprocess.run(here.command(number, [*check, "--host", here.name(number)]), check=True)
    wait_for(lambda: not any(here.processes(number) for number in range(3)), 10)
    assert not any(here.processes(number) for number in range(3)), "nothing is left"


@pytest.mark.parametrize(
    "how", [pytest.param("killed", marks=thorough), pytest.param("stopped", marks=thorough), "cut off"]
)
def test_when_a_host_is_gone_clients_hear_why_and_the_group_ends(
    how: str, hosts: Callable[[int], Hosts], smollm2: Path, log_dirs: Iterator[Path]
) -> None:
    here = hosts(2)
    log_dir = next(log_dirs)
    groups, url = group_over(here, 2, smollm2, log_dir), f"http://{here.addresses[0]}:{PORT}"
    with started(groups, url), ThreadPoolExecutor(2) as clients:
        (prompt,) = prompts(smollm2, (6000,))
        asked = [
            clients.submit(requests.post, f"{url}/generate", json={"input_ids": prompt, "stream": stream}, timeout=60)
            for stream in (False, True)
        ]
        assert wait_for(lambda: "#new-token" in groups[0].log_tail(3), 20)
        began = time.monotonic()
        if how == "cut off":
            here.cut_off(1)
        else:
            here.signal(1, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        for each in asked:
            answer = each.result(timeout=10)
            assert "Host 1 (apb-host1) is gone: it has ended, hangs, or cannot be reached." in answer.text
        assert time.monotonic() - began < 5
        assert asked[0].result().status_code == 503
        ended = [groups[0]] if how == "stopped" else groups
        assert wait_for(lambda: all(group.exit_status is not None for group in ended), 10)
        assert groups[0].exit_status == 1


@thorough
def test_a_host_whose_rank_is_killed_ends_with_a_status(
    hosts: Callable[[int], Hosts], smollm2: Path, log_dirs: Iterator[Path]
) -> None:
    """SGLang would wait for the host's ranks in order, and end with status 0."""
    here = hosts(2)
    groups, url = group_over(here, 2, smollm2, next(log_dirs)), f"http://{here.addresses[0]}:{PORT}"
    with started(groups, url):
        ranks = [each for each in here.processes(1) if each.cmdline()[0].startswith("sglang::scheduler")]
        assert len(ranks) == 1
        ranks[0].kill()
        assert wait_for(lambda: all(group.exit_status is not None for group in groups), 10)
        assert all(group.exit_status for group in groups), [group.exit_status for group in groups]
