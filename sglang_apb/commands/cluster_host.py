"""What a cluster's file puts on one of its hosts: parts of servers, and perhaps the router."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sglang_apb.cluster.file import PREFILL, ClusterError, ClusterFile, Server, read
from sglang_apb.cluster.keys import transfer_config
from sglang_apb.commands import CommandError
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import SERVER_ENV, STARTUP_TIMEOUT_S, LocalService, Report

# A document's later questions find their cache where the first one was computed: the client's X-SMG-Routing-Key says
# where. Servers come and go, so they are asked each second, and a request that met one that is gone goes to another
# pair; a breaker would blame the sound one of a pair, too.
_ROUTER = (
    *("--prefill-policy", "manual", "--assignment-mode", "min_load", "--decode-policy", "round_robin"),
    *("--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1"),
    *("--disable-circuit-breaker", "--worker-startup-check-interval", "1"),
)


def read_file(path: Path) -> ClusterFile:
    """Raises CommandError."""
    try:
        return read(path)
    except ClusterError as error:
        raise CommandError(str(error)) from error


def check_host(cluster: ClusterFile, host: str) -> None:
    """Raises CommandError."""
    if host not in cluster.hosts:
        raise CommandError(f"--host {host} is not among the file's hosts: {', '.join(cluster.hosts)}")


class ClusterHost(LocalService):
    """Everything of `cluster` that belongs on `host`, and nothing else. Raises CommandError where that is nothing."""

    def __init__(self, cluster: ClusterFile, host: str, log_dir: Path, report: Report | None = None):
        check_host(cluster, host)
        address = cluster.address(host)
        groups = [server_group(cluster, server, host, log_dir) for server in cluster.servers_on(host)]
        self._has_router = cluster.router.host == host
        if self._has_router:
            groups.append(ProcessGroup("router", router_command(cluster), log_dir / "router.log"))
        if not groups:
            raise CommandError(f"nothing of the cluster is on host {host}")
        ports = cluster.ports_on(host)
        ports |= {group.name: ports[f"{group.name}'s server"] for group in groups if group.name != "router"}
        url = f"http://{address}:{cluster.router.port if self._has_router else ports[groups[0].name]}"
        super().__init__(groups, url, ports, report, host=address)

    def wait_ready(self, timeout: float = STARTUP_TIMEOUT_S) -> None:
        """Returns once a chat completion has succeeded where the router is, elsewhere once the host's servers answer.

        `timeout` in seconds. Raises ServiceError.
        """
        if self._has_router:
            super().wait_ready(timeout)
        else:
            self._wait_until(lambda: all(map(self._is_up, self.groups)), "starting", timeout)


def server_group(cluster: ClusterFile, server: Server, host: str, log_dir: Path) -> ProcessGroup:
    """The ranks of `server` that are on `host`."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", cluster.model]
    command += ["--host", cluster.address(host), "--port", str(server.port)]
    command += ["--disaggregation-mode", server.role, "--disaggregation-transfer-backend", "zmq"]
    if config := transfer_config(cluster, server):
        command += ["--kv-transfer-config", json.dumps(config)]
    if server.role == PREFILL:
        command += ["--disaggregation-bootstrap-port", str(server.bootstrap_port), *_prefill_arguments(cluster, server)]
    elif server.num_ranks > 1:
        command += ["--tp-size", str(server.num_ranks)]
    if len(server.hosts) > 1:
        first = f"{cluster.address(server.hosts[0])}:{server.ranks_port}"
        number = server.hosts.index(host)
        command += ["--nnodes", str(len(server.hosts)), "--node-rank", str(number), "--dist-init-addr", first]
    else:
        command += ["--nccl-port", str(server.ranks_port)]
    if server.first_gpu is not None:
        command += ["--base-gpu-id", str(server.first_gpu)]
    command += [*cluster.arguments, *server.arguments]
    return ProcessGroup(server.name, command, log_dir / f"{server.name}.log", SERVER_ENV)


def _prefill_arguments(cluster: ClusterFile, server: Server) -> list[str]:
    arguments = ["--prefill-backend", cluster.prefill_backend, "--sp-size", str(server.num_ranks)]
    config = cluster.prefill_backend_config
    if config:
        arguments += ["--prefill-backend-config", config if isinstance(config, str) else json.dumps(config)]
    return arguments


def router_command(cluster: ClusterFile) -> list[str]:
    """Asks the first host of each server."""
    router, address = cluster.router, cluster.address(cluster.router.host)
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    for server in cluster.servers:
        command += [f"--{server.role}", f"http://{cluster.address(server.hosts[0])}:{server.port}"]
        command += [str(server.bootstrap_port)] if server.role == PREFILL else []
    command += ["--host", address, "--port", str(router.port)]
    command += ["--prometheus-host", address, "--prometheus-port", str(router.port + 1)]
    return [*command, *_ROUTER, *router.arguments]
