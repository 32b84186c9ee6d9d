"""The file that describes a cluster, and what in it cannot be.

model = "/models/llama"
keys = "/etc/sglang-apb/keys"          # of `sglang-apb cluster keys`; not needed where all is loopback

[hosts]                                # names, and the addresses by which they reach each other
a = "10.0.0.1"
b = "10.0.0.2"
c = "10.0.0.3"

[router]
host = "c"

[[servers]]
name = "prefill0"
role = "prefill"
hosts = ["a", "b"]                     # which share its ranks
ranks = 2
port = 30100                           # and the next ones: see `ports_on`

[[servers]]
name = "decode0"
role = "decode"
hosts = ["c"]
port = 30200
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from sglang_apb.transfer.protocol.hosts import is_loopback_host

PREFILL, DECODE = "prefill", "decode"
# Of a server's ports, from its `port` on; the KV of rank i of a host leaves at KV + i.
_BOOTSTRAP, _RANKS, _WATCH, _KV = 1, 2, 3, 10
# What servers are given by the file, or what the others could not ask them with.
_GIVEN = (
    *("--host", "--port", "--model-path", "--model", "--nnodes", "--node-rank", "--dist-init-addr", "--nccl-port"),
    *("--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port"),
    *("--kv-transfer-config", "--prefill-backend", "--sp-size", "--prefill-backend-config", "--base-gpu-id"),
    *("--ssl-certfile", "--ssl-keyfile", "--grpc-mode", "--smg-grpc-mode"),
)


class ClusterError(ValueError):
    """The file cannot be read, or what it describes cannot be; the text says what, and the remedy."""


class Router(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`port`: of its clients; its metrics have the next one. `arguments` are `sglang_router.launch_router`'s."""

    host: str
    port: int = 30000
    arguments: list[str] = []


class Server(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`hosts` share its `ranks`, each as many: on a GPU each, from `first_gpu` on, which is the first if left out.
    `model`: only for the check that it is the others'. `arguments` are `sglang.launch_server`'s.
    """

    name: str
    role: Literal["prefill", "decode"]
    hosts: list[str]
    port: int
    ranks: int = 0  # 0: one a host
    first_gpu: int | None = None
    model: str = ""
    arguments: list[str] = []

    @property
    def num_ranks(self) -> int:
        return self.ranks or len(self.hosts)

    @property
    def ranks_on_a_host(self) -> int:
        return self.num_ranks // max(len(self.hosts), 1)

    @property
    def bootstrap_port(self) -> int:
        return self.port + _BOOTSTRAP

    @property
    def ranks_port(self) -> int:
        return self.port + _RANKS

    @property
    def kv_port(self) -> int:
        return self.port + _KV

    def ports_on(self, host: str) -> dict[str, int]:
        """What listens there, and where."""
        is_first = host == self.hosts[0]
        ports = {"server": self.port}
        if is_first:
            ports["ranks"] = self.ranks_port
            ports |= {f"watch of {other}": self.port + _WATCH + i for i, other in enumerate(self.hosts[1:])}
        if self.role == PREFILL:
            ports |= {"bootstrap": self.bootstrap_port} if is_first else {}
            ports |= {f"KV of rank {rank}": self.kv_port + rank for rank in range(self.ranks_on_a_host)}
        return ports


class ClusterFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`arguments` go to all servers. `prefill_backend_config` as the option, a table or a preset's name."""

    model: str
    hosts: dict[str, str]
    router: Router
    servers: list[Server]
    keys: str = ""
    prefill_backend: str = "apb"
    prefill_backend_config: dict[str, object] | str = ""
    log_dir: str = "logs"
    arguments: list[str] = []

    def server(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    def servers_on(self, host: str) -> list[Server]:
        return [server for server in self.servers if host in server.hosts]

    def of_role(self, role: str) -> list[Server]:
        return [server for server in self.servers if server.role == role]

    def address(self, host: str) -> str:
        return self.hosts[host]

    def peers_of(self, server: Server) -> list[Server]:
        """Those that it speaks with about KV."""
        return self.of_role(DECODE if server.role == PREFILL else PREFILL)

    def ports_on(self, host: str) -> dict[str, int]:
        ports = {
            f"{server.name}'s {what}": port
            for server in self.servers_on(host)
            for what, port in server.ports_on(host).items()
        }
        if self.router.host == host:
            ports |= {"router": self.router.port, "router's metrics": self.router.port + 1}
        return ports

    def ports_to_reach(self, host: str) -> dict[str, tuple[str, int]]:
        """What `host` must connect to on others: address and port by what is there."""
        found: dict[str, tuple[str, int]] = {}
        for server in self.servers:
            first = self.address(server.hosts[0])
            if host == self.router.host:
                found[f"{server.name}'s server"] = first, server.port
            number = server.hosts.index(host) if host in server.hosts else 0
            if number:
                found[f"{server.name}'s ranks"] = first, server.ranks_port
                found[f"{server.name}'s watch of {host}"] = first, server.port + _WATCH + number - 1
            is_peer = any(server in self.peers_of(other) for other in self.servers_on(host))
            if server.role == PREFILL and (number or is_peer):
                found[f"{server.name}'s bootstrap"] = first, server.bootstrap_port
            if server.role == PREFILL and is_peer:
                for place in server.hosts:
                    for rank in range(server.ranks_on_a_host):
                        there = self.address(place), server.kv_port + rank
                        found[f"KV of {server.name}'s rank {rank} on {place}"] = there
        return found

    @property
    def is_local(self) -> bool:
        return all(is_loopback_host(address) for address in self.hosts.values())


def read(path: Path) -> ClusterFile:
    """Raises ClusterError when the file is none, has unknown keys, or describes what cannot be."""
    try:
        content = tomllib.loads(path.read_text())
        cluster = msgspec.convert(content, ClusterFile)
    except OSError as error:
        raise ClusterError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{path} is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ClusterError(f"{path}: {_with_known_fields(str(error))}") from error
    if found := list(problems(cluster)):
        raise ClusterError("\n".join(f"{path}: {each}" for each in found))
    return cluster


def problems(cluster: ClusterFile) -> Iterator[str]:
    """A sentence for each thing that cannot be, as far as the file shows it."""
    names = Counter(server.name for server in cluster.servers)
    yield from (
        f"{count} servers are called {name!r}: each needs a name of its own"
        for name, count in names.items()
        if count > 1
    )
    for role in (PREFILL, DECODE):
        if not cluster.of_role(role):
            yield f"there is no {role} server: a router needs one of each role"
    if cluster.router.host not in cluster.hosts:
        yield f"the router's host {cluster.router.host!r} is not among [hosts]: {', '.join(cluster.hosts)}"
    for server in cluster.servers:
        yield from _problems_of(server, cluster)
    if any(host not in cluster.hosts for server in cluster.servers for host in server.hosts):
        return
    for host in cluster.hosts:
        yield from _ports_twice(cluster, host)
        yield from _gpus_twice(cluster, host)
    if not cluster.keys and not cluster.is_local:
        yield "KV would leave its host unencrypted: give `keys`, a folder, and run `sglang-apb cluster keys`"


def _problems_of(server: Server, cluster: ClusterFile) -> Iterator[str]:
    name = server.name
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
        yield f"a server's name is made of letters, digits, '-', '_' and '.', not {name!r}"
    for host in server.hosts:
        if host not in cluster.hosts:
            yield f"{name}'s host {host!r} is not among [hosts]: {', '.join(cluster.hosts)}"
    if not server.hosts or len(set(server.hosts)) < len(server.hosts):
        yield f"{name}'s hosts must be one or more, each once, not {server.hosts}"
    elif server.ranks < 0 or server.num_ranks % len(server.hosts):
        yield (
            f"{name}'s {server.ranks} ranks cannot be shared out over {len(server.hosts)} hosts: each has as many, "
            f"for example ranks = {len(server.hosts) * max(server.ranks // len(server.hosts), 1)}"
        )
    if server.role == DECODE and len(server.hosts) > 1:
        yield f"{name} is a decode server with {len(server.hosts)} hosts: its ranks share one; describe one for each"
    if not 0 < server.port < 65536 - _KV - server.num_ranks:
        yield f"{name}'s port {server.port} must leave room for those that follow it, up to 65535"
    if server.model and server.model != cluster.model:
        yield f"{name}'s model {server.model} is not the others', {cluster.model}: KV of one is of no use to another"
    for argument in (*server.arguments, *cluster.arguments):
        if (option := argument.partition("=")[0]) in _GIVEN:
            yield f"{option} among {name}'s arguments: the file says it by another key, leave it out"


def _ports_twice(cluster: ClusterFile, host: str) -> Iterator[str]:
    for port, users in _shared((port, what) for what, port in cluster.ports_on(host).items()):
        yield f"port {port} of host {host} is used twice: {users}"


def _gpus_twice(cluster: ClusterFile, host: str) -> Iterator[str]:
    """Of servers that say which GPUs are theirs."""
    placed = [(server.first_gpu, server) for server in cluster.servers_on(host) if server.first_gpu is not None]
    gpus = ((first + i, server.name) for first, server in placed for i in range(server.ranks_on_a_host))
    for gpu, users in _shared(gpus):
        yield f"GPU {gpu} of host {host} is used twice: {users}; give one another first_gpu"


def _shared(pairs: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Numbers that several have, with their names."""
    users: dict[int, list[str]] = {}
    for number, name in pairs:
        users.setdefault(number, []).append(name)
    yield from ((number, " and ".join(names)) for number, names in users.items() if len(names) > 1)


def _with_known_fields(error: str) -> str:
    """msgspec's sentence, with the fields that there are."""
    if "unknown field" not in error:
        return error
    kind = Server if "$.servers" in error else Router if "$.router" in error else ClusterFile
    return f"{error}; known: {', '.join(field.name for field in msgspec.structs.fields(kind))}"
