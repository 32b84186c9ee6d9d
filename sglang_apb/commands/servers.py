"""SGLang servers on this machine as context managers: one server, or prefill, decode and router.

For example:

    with LocalCluster("model-dir", port=30000, log_dir=Path("logs"), sp_size=2) as cluster:
        cluster.wait_ready()
        requests.post(f"{cluster.url}/v1/chat/completions", json=...)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Self

from sglang_apb.commands import CommandError
from sglang_apb.commands.polling import ServiceError, ask_chat, is_up
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.transfer.protocol.hosts import why_not_free

HOST = "127.0.0.1"
STARTUP_TIMEOUT_S = 1800.0
_POLL_S = 0.5
_REPORT_INTERVAL_S = 10.0
_LAST_LINES = 3
# SGLang's health check runs a token through the model, which has to wait for a long prefill: a busy server
# would be taken for a dead one.
SERVER_ENV = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}

Report = Callable[[str], None]


class LocalService:
    """Servers that start together, are ready together, and end together.

    `url` answers OpenAI requests once `wait_ready` has returned, those with `api_key` where there is one. `ports` maps
    what a port is for to its number; a group's own has its name. All are at the address `host`. `report` gets lines of
    progress.
    """

    def __init__(
        self,
        groups: Sequence[ProcessGroup],
        url: str,
        ports: dict[str, int],
        report: Report | None = None,
        api_key: str | None = None,
        host: str = HOST,
    ):
        self._host = host
        self.groups = tuple(groups)
        self.url = url
        self._ports = ports
        self._report = report or (lambda line: None)
        self._api_key = api_key
        self._said = ""

    def start(self) -> None:
        """Raises CommandError when a port is in use."""
        check_ports(self._ports, self._host)
        try:
            for group in self.groups:
                group.start()
                self._started(group)
        except BaseException:
            self.stop()
            raise

    def _started(self, group: ProcessGroup) -> None:
        """Called after each group's start, before the next one's."""

    def check(self) -> None:
        """Raises ServiceError when a server has ended; the text has its log's last lines, and errors before them."""
        for group in self.groups:
            if group.exit_status is not None:
                tail = group.log_tail()
                earlier = [line for line in group.log_errors() if line not in tail]
                raise ServiceError(
                    f"the {group.name} ended with status {group.exit_status}; last lines of {group.log_path}:\n{tail}"
                    + "".join(f"\nbefore them: {line}" for line in earlier)
                )

    def wait_ready(self, timeout: float = STARTUP_TIMEOUT_S) -> None:
        """Returns once a chat completion has succeeded. `timeout` in seconds. Raises ServiceError."""
        self._wait_until(self._completes_chat, "starting", timeout)

    def _completes_chat(self) -> bool:
        reply = ask_chat(self.url, self._api_key)
        self._said = reply.said
        return reply.is_ok

    def _wait_until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        started = reported = time.monotonic()
        while not condition():
            self.check()
            waited = time.monotonic() - started
            if waited > timeout:
                logs = self.groups[0].log_path.parent
                raise ServiceError(f"not ready after {timeout:.0f} s; logs: {logs}{self._why_not_ready()}")
            if waited > reported - started + _REPORT_INTERVAL_S:
                reported = time.monotonic()
                self._report(f"{what}, {waited:.0f} s" + (f"; {self._said}" if self._said else ""))
            time.sleep(_POLL_S)

    def _why_not_ready(self) -> str:
        """Who does not answer, what its log says of it, and what was answered last."""
        silent = [group for group in self.groups if not self._is_up(group)]
        lines = [f"the {group.name} does not answer its health check" for group in silent]
        if self._said:
            lines.append(f"last answer of {self.url}: {self._said}")
        for group in silent or self.groups:
            lines += [f"{group.log_path.name}: {line}" for line in group.log_errors() or group.log_lines(_LAST_LINES)]
        return "".join(f"\n{line}" for line in lines)

    def _is_up(self, group: ProcessGroup) -> bool:
        return group.name not in self._ports or is_up(f"http://{self._host}:{self._ports[group.name]}")

    def wait(self) -> None:
        """Blocks while every server runs. Raises ServiceError when one has ended."""
        while True:
            self.check()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends every process. Stopping twice is a no-op."""
        for group in self.groups:
            group.request_stop()
        for group in self.groups:
            group.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class LocalServer(LocalService):
    """One `sglang.launch_server`. `arguments` go to it as they are; its log is `log_dir`/server.log."""

    def __init__(
        self,
        model: str,
        *,
        port: int,
        log_dir: Path,
        arguments: Sequence[str] = (),
        report: Report | None = None,
    ):
        ports = {"server": port, "server's ranks": port + 1}
        group = server_group("server", model, ports, arguments, log_dir / "server.log")
        super().__init__([group], f"http://{HOST}:{port}", ports, report, value_of("--api-key", arguments))


class LocalCluster(LocalService):
    """A prefill server of `sp_size` ranks, a decode server and a router; ports `port` to `port` + 6.

    `prefill_backend` None is stock SGLang. `arguments` go to both servers, `prefill_arguments` and
    `decode_arguments` to one, as they are; an `--api-key` among them is the router's, too. Logs: prefill.log,
    decode.log and router.log in `log_dir`. Raises CommandError when the two servers have different keys.
    """

    def __init__(
        self,
        model: str,
        *,
        port: int,
        log_dir: Path,
        sp_size: int = 2,
        prefill_backend: str | None = "apb",
        transfer_backend: str = "zmq",
        arguments: Sequence[str] = (),
        prefill_arguments: Sequence[str] = (),
        decode_arguments: Sequence[str] = (),
        report: Report | None = None,
    ):
        ports = _cluster_ports(port)
        transfer = ["--disaggregation-transfer-backend", transfer_backend]
        prefill = ["--disaggregation-mode", "prefill", *transfer]
        prefill += ["--disaggregation-bootstrap-port", str(ports["prefill server's bootstrap"])]
        if prefill_backend:
            prefill += ["--prefill-backend", prefill_backend, "--sp-size", str(sp_size)]
        decode = ["--disaggregation-mode", "decode", *transfer]
        self._placement = place(num_gpus(), sp_size)
        prefill += [*self._placement.prefill, *arguments, *prefill_arguments]
        decode += [*self._placement.decode, *arguments, *decode_arguments]
        api_key = value_of("--api-key", prefill)
        if api_key != value_of("--api-key", decode):
            raise CommandError(
                "prefill and decode need the same --api-key, since one router asks both: give it to both"
            )
        groups = [
            server_group("prefill server", model, ports, prefill, log_dir / "prefill.log"),
            server_group("decode server", model, ports, decode, log_dir / "decode.log"),
            ProcessGroup("router", _router_command(ports, api_key), log_dir / "router.log"),
        ]
        self._prefill_url = f"http://{HOST}:{ports['prefill server']}"
        super().__init__(groups, f"http://{HOST}:{port}", ports, report, api_key)

    def _started(self, group: ProcessGroup) -> None:
        if group is self.groups[0] and self._placement.in_turn:
            self._wait_until(lambda: is_up(self._prefill_url), "starting the prefill server", STARTUP_TIMEOUT_S)


@dataclass(frozen=True)
class Placement:
    """Arguments that put each server on its GPUs. `in_turn`: decode may start when prefill has its memory."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    in_turn: bool = False


def place(num_gpus: int, sp_size: int) -> Placement:
    """Prefill ranks on GPUs [0, sp_size), decode on the next one, or on GPU 0 beside prefill."""
    if num_gpus == 0:
        return Placement()
    if num_gpus > sp_size:
        return Placement(decode=("--base-gpu-id", str(sp_size)))
    # SGLang takes a fraction of the memory that it finds free: 0.4 of the GPU here, and then 0.6 of the rest.
    return Placement(("--mem-fraction-static", "0.4"), ("--mem-fraction-static", "0.6"), in_turn=True)


@cache
def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def default_sp_size() -> int:
    """Two ranks, unless the machine has one GPU: two ranks cannot share it."""
    return 1 if num_gpus() == 1 else 2


def check_ports(ports: dict[str, int], host: str = HOST) -> None:
    """Raises CommandError for the first port that is taken; `ports` maps what a port is for to its number."""
    for purpose, port in ports.items():
        if not 0 < port < 65536:
            raise CommandError(f"port {port} for the {purpose} does not exist: choose a smaller --port")
        if why := why_not_free(host, port):
            raise CommandError(
                f"port {port} for the {purpose} is not free ({why}): end what listens there, or choose another "
                f"--port (it and the next {len(ports) - 1} are used)"
            )


def _cluster_ports(port: int) -> dict[str, int]:
    purposes = (
        "router",
        "prefill server",
        "decode server",
        "prefill server's bootstrap",
        "prefill server's ranks",
        "decode server's ranks",
        "router's metrics",
    )
    return {purpose: port + index for index, purpose in enumerate(purposes)}


def server_group(
    name: str, model: str, ports: dict[str, int], arguments: Sequence[str], log_path: Path
) -> ProcessGroup:
    """One `sglang.launch_server`; `ports` has its own and its ranks."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--host", HOST]
    command += ["--port", str(ports[name])]
    if not _has_replicas(arguments):  # which find theirs by themselves
        command += ["--nccl-port", str(ports[f"{name}'s ranks"])]
    return ProcessGroup(name, [*command, *arguments], log_path, SERVER_ENV)


def _has_replicas(arguments: Sequence[str]) -> bool:
    """SGLang takes beginnings of its options' names, too."""
    names = ("--dp", "--dp-", "--dp-size", "--data-parallel-size")
    return any(value_of(name, arguments) not in (None, "1") for name in names)


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What the last `option` of a command line is given, as SGLang's parser takes it; None without one."""
    value = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _router_command(ports: dict[str, int], api_key: str | None) -> list[str]:
    prefill_url, decode_url = (f"http://{HOST}:{ports[name]}" for name in ("prefill server", "decode server"))
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--prefill", prefill_url, str(ports["prefill server's bootstrap"]), "--decode", decode_url]
    command += ["--host", HOST, "--port", str(ports["router"])]
    command += ["--prometheus-host", HOST, "--prometheus-port", str(ports["router's metrics"])]
    # With one server a side there is no other to retry on, or to turn to when a breaker opens or one is not healthy:
    # asked once a minute, one that is back would be missed for two more.
    command += ["--policy", "round_robin", "--disable-retries", "--disable-circuit-breaker", "--disable-health-check"]
    # It asks the servers with the key, and its clients for it.
    command += ["--api-key", api_key] if api_key else []
    return [*command, "--worker-startup-check-interval", "1"]
