"""A cluster's file: what it puts on each host, and what in it cannot be."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_apb import cli
from sglang_apb.cluster import keys
from sglang_apb.cluster.file import ClusterError, ClusterFile, read
from sglang_apb.commands import CommandError
from sglang_apb.commands.cluster_host import ClusterHost, router_command, server_group
from sglang_apb.transfer.protocol import keys as transfer_keys
from sglang_apb.transfer.protocol.config import TransferConfig

FILE = """
model = "/models/llama"
keys = "KEYS"
arguments = ["--dtype", "bfloat16"]
prefill_backend_config = {block = 2048}

[hosts]
a = "10.0.0.1"
b = "10.0.0.2"
c = "10.0.0.3"

[router]
host = "c"

[[servers]]
name = "prefill0"
role = "prefill"
hosts = ["a", "b"]
ranks = 4
port = 30100

[[servers]]
name = "decode0"
role = "decode"
hosts = ["c"]
port = 30200
first_gpu = 1
arguments = ["--max-running-requests", "64"]
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def change(*changes: tuple[str, str]) -> Path:
        text = FILE.replace("KEYS", str(tmp_path / "keys"))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "cluster.toml").write_text(text)
        return tmp_path / "cluster.toml"

    return change


def command(cluster: ClusterFile, name: str, host: str) -> str:
    group = server_group(cluster, cluster.server(name), host, Path("logs"))
    return " ".join(group.command[3:])


def test_each_host_gets_its_part_of_a_server(write: Write) -> None:
    cluster = read(write())
    first, second = (command(cluster, "prefill0", host) for host in "ab")
    same = "--disaggregation-mode prefill --disaggregation-transfer-backend zmq"
    for part, host, number in ((first, "10.0.0.1", 0), (second, "10.0.0.2", 1)):
        assert part.startswith(f"--model-path /models/llama --host {host} --port 30100 {same}")
        assert f"--sp-size 4 --prefill-backend-config {json.dumps({'block': 2048})}" in part
        assert f"--nnodes 2 --node-rank {number} --dist-init-addr 10.0.0.1:30102 --dtype bfloat16" in part
        assert "--disaggregation-bootstrap-port 30101" in part and '"port": 30110' in part
    decode = command(cluster, "decode0", "c")
    assert decode.endswith("--nccl-port 30202 --base-gpu-id 1 --dtype bfloat16 --max-running-requests 64")
    assert "--sp-size" not in decode and '"port"' not in decode
    router = " ".join(router_command(cluster))
    assert "--prefill http://10.0.0.1:30100 30101 --decode http://10.0.0.3:30200 --host 10.0.0.3 --port 30000" in router
    assert "--prefill-policy manual --assignment-mode min_load" in router and "--disable-circuit-breaker" in router


def test_a_host_starts_what_is_its_own(write: Write) -> None:
    cluster = read(write())
    names = {host: [group.name for group in ClusterHost(cluster, host, Path("logs")).groups] for host in "abc"}
    assert names == {"a": ["prefill0"], "b": ["prefill0"], "c": ["decode0", "router"]}
    with pytest.raises(CommandError, match="--host d is not among the file's hosts: a, b, c"):
        ClusterHost(cluster, "d", Path("logs"))
    alone = read(write(('c = "10.0.0.3"', 'c = "10.0.0.3"\nd = "10.0.0.4"')))
    with pytest.raises(CommandError, match="nothing of the cluster is on host d"):
        ClusterHost(alone, "d", Path("logs"))


def test_ports_of_a_host_and_those_that_it_must_reach(write: Write) -> None:
    cluster = read(write())
    assert cluster.ports_on("a") == {
        "prefill0's server": 30100,
        "prefill0's ranks": 30102,
        "prefill0's watch of b": 30103,
        "prefill0's bootstrap": 30101,
        "prefill0's KV of rank 0": 30110,
        "prefill0's KV of rank 1": 30111,
    }
    assert set(cluster.ports_on("b").values()) == {30100, 30110, 30111}
    assert set(cluster.ports_to_reach("b").values()) == {("10.0.0.1", port) for port in (30101, 30102, 30103)}
    assert set(cluster.ports_to_reach("c").values()) == {
        *(("10.0.0.1", port) for port in (30100, 30101, 30110, 30111)),
        *(("10.0.0.2", port) for port in (30110, 30111)),
        ("10.0.0.3", 30200),
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('host = "c"', 'host = "z"'), "the router's host 'z' is not among [hosts]: a, b, c"),
        (('hosts = ["c"]', 'hosts = ["z"]'), "decode0's host 'z' is not among [hosts]: a, b, c"),
        (("ranks = 4", "ranks = 3"), "prefill0's 3 ranks cannot be shared out over 2 hosts: each has as many"),
        (('role = "decode"', 'role = "prefill"'), "there is no decode server: a router needs one of each role"),
        (('name = "decode0"', 'name = "prefill0"'), "2 servers are called 'prefill0'"),
        (("port = 30200", "port = 30000"), "port 30000 of host c is used twice: decode0's server and router"),
        (("port = 30200", "port = 65530"), "decode0's port 65530 must leave room for those that follow it"),
        (("first_gpu", 'model = "/models/qwen"\nfirst_gpu'), "decode0's model /models/qwen is not the others'"),
        (('"--max-running-requests"', '"--port"'), "--port among decode0's arguments: the file says it by another key"),
        (('hosts = ["c"]', 'hosts = ["b", "c"]'), "decode0 is a decode server with 2 hosts"),
        (('hosts = ["a", "b"]', 'hosts = ["a", "a"]'), "prefill0's hosts must be one or more, each once"),
        (
            ("ranks = 4", "rank = 4"),
            "unknown field `rank` - at `$.servers[0]`; known: name, role, hosts, port",
        ),
        (("ranks = 4", 'ranks = "4"'), "Expected `int`, got `str` - at `$.servers[0].ranks`"),
        (('keys = "', 'Keys = "'), "unknown field `Keys`; known: model, hosts, router, servers, keys"),
        (("[router]", "[router"), "is no TOML"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_starts(
    change: tuple[str, str], sentence: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cluster", "check", str(write(change))]) == 1
    assert sentence in capsys.readouterr().err


def test_two_servers_cannot_have_one_gpu(write: Write) -> None:
    more = '\n[[servers]]\nname = "decode1"\nrole = "decode"\nhosts = ["c"]\nport = 30300\nfirst_gpu = 1\n'
    path = write()
    path.write_text(path.read_text() + more)
    with pytest.raises(ClusterError, match="GPU 1 of host c is used twice: decode0 and decode1"):
        read(path)


def test_without_keys_nothing_but_loopback_is_served(write: Write, tmp_path: Path) -> None:
    without = (f'keys = "{tmp_path}/keys"', "")
    with pytest.raises(ClusterError, match="KV would leave its host unencrypted: give `keys`"):
        read(write(without))
    assert read(write(without, *((f"10.0.0.{i}", "127.0.0.1") for i in (1, 2, 3)), ('["a", "b"]', '["a"]'))).is_local


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "check", "/nowhere.toml"]) == 1
    assert "cannot read /nowhere.toml: No such file" in capsys.readouterr().err


def test_keys_let_in_whom_the_file_lets_speak(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write()
    check = ["cluster", "check", str(path), "--host", "a"]
    assert cli.main(check) == 1 and "prefill0 has no keys" in capsys.readouterr().err
    assert cli.main(["cluster", "keys", str(path)]) == 0
    assert cli.main(check) == 0, capsys.readouterr().err
    cluster = read(path)
    pairs = {}
    for server in cluster.servers:
        config = keys.transfer_config(cluster, server)
        pairs[server.name] = transfer_keys.load(TransferConfig(**config))
    prefill, decode = pairs["prefill0"], pairs["decode0"]
    assert prefill and decode and prefill.peers.allows(decode.public) and decode.peers.allows(prefill.public)
    assert not prefill.peers.allows(prefill.public), "prefill servers have nothing to say to each other"
    more = '\n[[servers]]\nname = "decode1"\nrole = "decode"\nhosts = ["b"]\nport = 30300\n'
    path.write_text(path.read_text() + more)
    assert cli.main(check) == 1
    assert "prefill0's keys let in decode0, and the file says decode0, decode1" in capsys.readouterr().err
    assert cli.main(["cluster", "keys", str(path)]) == 0 and cli.main(check) == 0
    again = transfer_keys.load(TransferConfig(**keys.transfer_config(cluster, cluster.server("prefill0"))))
    assert again and again.public == prefill.public, "a pair that is there stays"


def test_ports_that_nobody_lets_through_are_named(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write()
    assert cli.main(["cluster", "keys", str(path)]) == 0

    def connect(place: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out") if place == ("10.0.0.2", 30111) else ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    command = ["cluster", "check", str(path), "--connect"]
    assert cli.main([*command, "--host", "b"]) == 0, "nobody listens yet, and nothing is in between"
    assert cli.main([*command, "--host", "c"]) == 1
    sentence = "c cannot reach KV of prefill0's rank 1 on b at 10.0.0.2:30111 (timed out): let the firewall pass it"
    assert sentence in capsys.readouterr().err
    assert cli.main(command) == 1 and "say with --host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cluster", "F"], "--cluster FILE and --host NAME go together"),
        (["--model", "m", "--host", "a"], "--cluster FILE and --host NAME go together"),
        (["--cluster", "F", "--host", "a", "--sp-size", "2"], "--cluster takes the servers' ranks and arguments"),
        (["--cluster", "F", "--host", "a", "--", "--dtype", "float32"], "--cluster takes the servers' ranks"),
        (["--cluster", "/nowhere.toml", "--host", "a"], "cannot read /nowhere.toml"),
    ],
)
def test_what_launch_is_told_beside_a_cluster(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *options]) == 1
    assert sentence in capsys.readouterr().err
