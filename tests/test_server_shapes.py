"""Clusters of other shapes than one prefill and one decode server, through real servers and SGLang's router."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import ALL_PASSED, Answer, assert_ran_sparse, assert_same_tokens, generate
from conftest import FLOAT32, Plain, cluster, next_port, running, thorough

from sglang_apb.commands import servers
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalCluster, LocalService

pytestmark = pytest.mark.server
CONFIG = ("--prefill-backend-config", ALL_PASSED)
ZMQ = ("--disaggregation-transfer-backend", "zmq")
NUM_ASKED = 12


def several_servers(model: Path, log_dir: Path, num_prefill: int, num_decode: int, *more: str) -> LocalService:
    """Servers of one rank each behind one router, which picks at random. The first prefill server's backend is APB,
    the others are plain SGLang's."""
    router = next_port()
    ports, groups = {"router": router}, []
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "random"]
    command += ["--host", servers.HOST, "--port", str(router), "--prometheus-port", str(router + 1)]
    for role, number in [("prefill", i) for i in range(num_prefill)] + [("decode", i) for i in range(num_decode)]:
        port = next_port()
        name = f"{role} {number}"
        used = {name: port, f"{name}'s ranks": port + 1}
        arguments = [*FLOAT32, "--max-total-tokens", "8000", *ZMQ, "--disaggregation-mode", role, *more]
        if role == "prefill":
            used[f"{name}'s bootstrap"] = port + 2
            arguments += ["--disaggregation-bootstrap-port", str(port + 2)]
            arguments += ["--prefill-backend", "apb", *CONFIG] if name == "prefill 0" else []
        ports |= used
        groups.append(servers.server_group(name, str(model), used, arguments, log_dir / f"{role}-{number}.log"))
        command += [f"--{role}", f"http://{servers.HOST}:{port}", *([str(port + 2)] if role == "prefill" else [])]
    groups.append(ProcessGroup("router", command, log_dir / "router.log"))
    return LocalService(groups, f"http://{servers.HOST}:{router}", ports)


def num_asked(log: Path) -> int:
    return sum("POST /generate HTTP" in line for line in log.read_text().splitlines())


def kinds(answers: list[Answer]) -> set[bool]:
    """Sparse or not: which of the prefill servers has answered."""
    return {answer.prefill is not None for answer in answers}


@thorough
def test_several_servers_on_either_side_answer_alike(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """Every decode server is sent KV by every prefill server: of two by two, all pairs come up in a dozen requests."""
    log_dir = next(log_dirs)
    answers: list[Answer] = []
    with running(several_servers(plain.model, log_dir, 2, 2)) as url:
        # The router takes servers up one by one, the last some seconds after the first.
        while len(answers) < NUM_ASKED or (len(answers) < 5 * NUM_ASKED and len(kinds(answers)) < 2):
            answers.append(generate(url, plain.prompts[1000]))
    for answer in answers:
        assert_same_tokens(answer, plain.answers[1000])
    assert len(kinds(answers)) == 2, "one prefill server only was asked"
    sparse = [answer for answer in answers if answer.prefill is not None]
    for answer in sparse:
        assert_ran_sparse(answer, 1)
        assert answer.prefill is not None and int(answer.prefill["kv_bytes"]) > 0
    for role in ("prefill", "decode"):
        asked = [num_asked(log_dir / f"{role}-{number}.log") for number in range(2)]
        assert all(asked), f"{role} servers were asked {asked} times: the router chose one only"


@thorough
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_each_of_three_decode_ranks_gets_its_heads(num_ranks: int, plain: Plain, log_dirs: Iterator[Path]) -> None:
    """SmolLM2 has 3 KV heads. A sparse prompt, and one on SGLang's path, whose chunks are sent one by one."""
    config = (*CONFIG, "--chunked-prefill-size", "128")
    service = cluster(plain.model, next(log_dirs), num_ranks, *config, decode_arguments=("--tp", "3"))
    with running(service) as url:
        exact, sparse = (generate(url, plain.prompts[length]) for length in (300, 1000))
    assert_ran_sparse(sparse, num_ranks)
    assert sparse.prefill is not None
    num_bytes = 1000 * plain.num_layers * 2 * 3 * 64 * 4  # tokens, layers, K and V, heads of 64 in float32
    assert sparse.prefill["kv_bytes"] == num_bytes
    assert_same_tokens(exact, plain.answers[300])
    assert_same_tokens(sparse, plain.answers[1000])


@thorough
def test_plain_prefill_of_three_ranks_to_one_decode_rank(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """Our transfer alone, from tensor-parallel ranks that hold one head each."""
    service = LocalCluster(
        str(plain.model),
        port=next_port(),
        log_dir=next(log_dirs),
        prefill_backend=None,
        arguments=FLOAT32,
        prefill_arguments=["--tp", "3"],
    )
    with running(service) as url:
        assert_same_tokens(generate(url, plain.prompts[300]), plain.answers[300])


@pytest.mark.skipif(importlib.util.find_spec("mooncake") is None, reason="needs Mooncake: see docs/transfer.md")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_mooncakes_tcp_takes_what_apb_prefilled(num_ranks: int, plain: Plain, log_dirs: Iterator[Path]) -> None:
    """SGLang's own transfer sends for one rank; all of them hold the whole prompt's KV then."""
    service = LocalCluster(
        str(plain.model),
        port=next_port(),
        log_dir=next(log_dirs),
        sp_size=num_ranks,
        transfer_backend="mooncake_tcp",
        arguments=FLOAT32,
        prefill_arguments=CONFIG,
    )
    with running(service) as url:
        assert_same_tokens(generate(url, plain.prompts[1000]), plain.answers[1000])


@thorough
def test_pages_go_through_files_where_both_servers_name_a_folder(
    plain: Plain, log_dirs: Iterator[Path], tmp_path: Path
) -> None:
    """The data plane that is an example. Until it is found, while the first prompt is computed, KV goes over ZMQ."""
    options = ("--kv-transfer-config", json.dumps({"data_plane": f"file:{tmp_path}"}))
    with running(cluster(plain.model, next(log_dirs), 2, *CONFIG, arguments=options)) as url:
        answers = [generate(url, plain.prompts[1000]) for _ in range(3)]
    for answer in answers:
        assert_same_tokens(answer, plain.answers[1000])
        assert_ran_sparse(answer, num_ranks=2)
    assert answers[-1].prefill is not None and answers[-1].prefill["kv_data_plane"] == "file"
    assert all(":" in path.name for path in tmp_path.iterdir()), "a file of a request that has ended is left"
