"""The servers that kinds of bench compare: one of plain SGLang for each way that it has, and APB's."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_apb.commands.bench import plain
from sglang_apb.commands.bench.table import APB
from sglang_apb.commands.servers import STARTUP_TIMEOUT_S, LocalServer, ServiceError, is_up, num_gpus

# The same for every server; what users have is left on: prefix cache, overlap, CUDA graphs. SGLang's table of 2,048
# requests of a million tokens would take 8.6 GB; few decode graphs are captured sooner.
_COMMON_GPU = ("--max-running-requests", "16", "--cuda-graph-max-bs-decode", "4")
# With large chunks plain SGLang is at its best on long prompts. They need room beside the KV pool; APB's server does
# not cut prompts, and sees to its room by itself. Prefill graphs go up to the chunk's size unless told otherwise, 170
# of them, whose capture takes minutes; beyond 16,384 tokens the GPU is never waiting for the host.
_PLAIN_GPU = (
    *("--chunked-prefill-size", "65536", "--mem-fraction-static", "0.6"),
    *("--cuda-graph-max-bs-prefill", "16384"),
)
_DUMMY_WEIGHTS = ("--load-format", "dummy", "--skip-tokenizer-init")
_END_GRACE_S = 15.0
_POLL_S = 0.2
_REASON_WIDTH = 300
# How a Python exception, and a refused option, stand in a log.
_ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception|Exit)\b.*|\S+: error: .*)$", re.MULTILINE)


@dataclass(frozen=True)
class ServerPlan:
    """A server to measure; `arguments` are those of `sglang.launch_server`."""

    name: str
    arguments: tuple[str, ...]


def plan_servers(
    backends: Sequence[str],
    *,
    gpus: int,
    dummy_weights: bool = False,
    config_text: str | None = None,
    bootstrap_port: int | None = None,
    plain_options: Mapping[str, Sequence[str]] | None = None,
    extra: Sequence[str] = (),
) -> list[ServerPlan]:
    """Plain SGLang in each of `backends`' ways (plain.py), then APB, each on `gpus` GPUs (ranks on a CPU).

    `plain_options`: of plain servers, by what is appended to a way's name; each way with each of them.

    APB's server runs short prompts and decode with the first one's attention; with a `bootstrap_port` it is the prefill
    server of a pair, whose ranks keep what they own. `extra` goes to all, last.
    """
    common = [*common_arguments(dummy_weights), *extra]
    options = plain_options or {"": _PLAIN_GPU if num_gpus() else ()}
    plans = [
        ServerPlan(backend + suffix, (*plain.parallel_arguments(backend, gpus), *arguments, *common))
        for backend in backends
        for suffix, arguments in options.items()
    ]
    apb = ["--prefill-backend", "apb", "--sp-size", str(gpus)]
    apb += ["--prefill-backend-config", config_text] if config_text else []
    apb += ["--attention-backend", plain.attention_backend(backends[0])] if backends else []
    if bootstrap_port is not None:
        apb += ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "zmq"]
        apb += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    return [*plans, ServerPlan(APB, (*apb, *common))]


def common_arguments(dummy_weights: bool) -> list[str]:
    """What every server that is measured is started with."""
    return [*(_COMMON_GPU if num_gpus() else ()), *(_DUMMY_WEIGHTS if dummy_weights else ())]


class BenchServer(LocalServer):
    """A server that need not know a tokenizer, and that says in one line why it is gone."""

    def wait_ready(self, timeout: float = STARTUP_TIMEOUT_S) -> None:
        """Returns once the health check succeeds, which it does after SGLang's own warm-up request.

        `timeout` in seconds. Raises ServiceError.
        """
        self._wait_until(lambda: is_up(self.url), "starting", timeout)

    def check(self) -> None:
        """Raises ServiceError when the server has ended; the text is one line."""
        group = self.groups[0]
        if group.exit_status is not None:
            found = _ERROR_LINE.findall(group.log_tail(200))
            why = found[0] if found else f"see {group.log_path}"
            raise ServiceError(f"the server ended with status {group.exit_status}: {why}"[:_REASON_WIDTH])

    def raise_why(self, error: Exception) -> None:
        """Raises ServiceError with the reason why a request got no answer: the server's end, or else `error`.

        A server that crashes closes its connections before it has ended, so this waits a little.
        """
        deadline = time.monotonic() + _END_GRACE_S
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_POLL_S)
        raise ServiceError(f"no answer: {error}"[:_REASON_WIDTH]) from error
