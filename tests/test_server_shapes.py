"""Clusters of other shapes than one prefill and one decode server, through real servers and SGLang's router."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from asking import ALL_PASSED, Answer, assert_ran_sparse, assert_same_tokens, generate, prompts
from conftest import FLOAT32, cluster, next_port, running, server, thorough

from sglang_apb.commands import servers
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalCluster, LocalService

pytestmark = pytest.mark.server
ZMQ = ("--disaggregation-transfer-backend", "zmq")
NUM_ASKED = 12


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.cut(smollm2, 3, tmp_path_factory.mktemp("cut"))


@dataclass(frozen=True)
class Plain:
    """Prompts of 300 and 1,000 tokens, and what one plain server of one rank says to them."""

    asked: list[list[int]]
    answers: list[Answer]


@pytest.fixture(scope="module")
def plain(model: Path, log_dirs: Iterator[Path]) -> Plain:
    asked = prompts(model, (300, 1000))
    with running(server(model, next(log_dirs))) as url:
        return Plain(asked, [generate(url, prompt) for prompt in asked])


def several_servers(model: Path, log_dir: Path, num_prefill: int, num_decode: int, *more: str) -> LocalService:
    """Servers of one rank each behind one router, which picks at random."""
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
            arguments += ["--prefill-backend", "apb", "--prefill-backend-config", ALL_PASSED]
        ports |= used
        groups.append(servers.server_group(name, str(model), used, arguments, log_dir / f"{role}-{number}.log"))
        command += [f"--{role}", f"http://{servers.HOST}:{port}", *([str(port + 2)] if role == "prefill" else [])]
    groups.append(ProcessGroup("router", command, log_dir / "router.log"))
    return LocalService(groups, f"http://{servers.HOST}:{router}", ports)


def num_asked(log: Path) -> int:
    return sum("POST /generate HTTP" in line for line in log.read_text().splitlines())


def test_several_servers_on_either_side_answer_alike(model: Path, log_dirs: Iterator[Path]) -> None:
    """Every decode server is sent KV by every prefill server: of two by two, all pairs come up in a dozen requests."""
    log_dir = next(log_dirs)
    (prompt,) = prompts(model, (1000,))
    with running(several_servers(model, log_dir, 2, 2)) as url:
        answers = [generate(url, prompt) for _ in range(NUM_ASKED)]
    for answer in answers:
        assert_ran_sparse(answer, 1)
        assert_same_tokens(answer, answers[0])
        assert answer.prefill is not None and int(answer.prefill["kv_bytes"]) > 0
    for role in ("prefill", "decode"):
        asked = [num_asked(log_dir / f"{role}-{number}.log") for number in range(2)]
        assert all(asked), f"{role} servers were asked {asked} times: the router chose one only"


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=thorough)])
def test_each_of_three_decode_ranks_gets_its_heads(
    num_ranks: int, model: Path, log_dirs: Iterator[Path], plain: Plain
) -> None:
    """SmolLM2 has 3 KV heads. A sparse prompt, and one on SGLang's path, whose chunks are sent one by one."""
    config = ("--prefill-backend-config", ALL_PASSED, "--chunked-prefill-size", "128")
    service = cluster(model, next(log_dirs), num_ranks, *config, decode_arguments=("--tp", "3"))
    with running(service) as url:
        exact, sparse = (generate(url, prompt) for prompt in plain.asked)
    assert_ran_sparse(sparse, num_ranks)
    assert sparse.prefill is not None
    assert sparse.prefill["kv_bytes"] == 1000 * 3 * 2 * 3 * 64 * 4, "tokens, layers, K and V, heads of 64 in float32"
    assert_same_tokens(exact, plain.answers[0])
    assert_same_tokens(sparse, plain.answers[1])


def test_plain_prefill_of_three_ranks_to_one_decode_rank(model: Path, log_dirs: Iterator[Path], plain: Plain) -> None:
    """Our transfer alone, from tensor-parallel ranks that hold one head each."""
    service = LocalCluster(
        str(model),
        port=next_port(),
        log_dir=next(log_dirs),
        prefill_backend=None,
        arguments=FLOAT32,
        prefill_arguments=["--tp", "3"],
    )
    with running(service) as url:
        assert_same_tokens(generate(url, plain.asked[0]), plain.answers[0])


@pytest.mark.skipif(importlib.util.find_spec("mooncake") is None, reason="needs Mooncake: see docs/transfer.md")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_mooncakes_tcp_takes_what_apb_prefilled(
    num_ranks: int, model: Path, log_dirs: Iterator[Path], plain: Plain
) -> None:
    """SGLang's own transfer sends for one rank; all of them hold the whole prompt's KV then."""
    service = LocalCluster(
        str(model),
        port=next_port(),
        log_dir=next(log_dirs),
        sp_size=num_ranks,
        transfer_backend="mooncake_tcp",
        arguments=FLOAT32,
        prefill_arguments=["--prefill-backend-config", ALL_PASSED],
    )
    with running(service) as url:
        assert_same_tokens(generate(url, plain.asked[1]), plain.answers[1])
