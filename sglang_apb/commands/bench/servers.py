"""The servers that `bench ttft` compares: plain SGLang with one attention backend each, and APB."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sglang_apb.commands.bench.table import APB
from sglang_apb.commands.servers import STARTUP_TIMEOUT_S, LocalServer, ServiceError, is_up, num_gpus

# The same for every server. Prompts share nothing, so a prefix cache has only its upkeep to add; a grammar is not
# asked for; and SGLang's table of 2,048 requests of a million tokens would take 8.6 GB.
_COMMON = ("--grammar-backend", "none", "--disable-radix-cache")
_COMMON_GPU = (
    *("--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "4"),
    *("--max-running-requests", "16", "--max-prefill-tokens", "524288"),
)
# With large chunks plain SGLang is at its best on long prompts. They need room beside the KV pool; APB's server does
# not cut prompts, and sees to its room by itself.
_PLAIN_GPU = ("--chunked-prefill-size", "65536", "--mem-fraction-static", "0.6")
_DUMMY_WEIGHTS = ("--load-format", "dummy", "--skip-tokenizer-init")
# GPUs that sgl_kernel's FlashAttention 3 is built for, by the major number of their compute capability.
_FA3_CAPABILITIES = (8, 9)
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
    extra: Sequence[str] = (),
) -> list[ServerPlan]:
    """Plain SGLang with each of `backends`, then APB, each on `gpus` GPUs (ranks on a CPU).

    APB's server runs short prompts and decode with the first of `backends`; with a `bootstrap_port` it is the prefill
    server of a pair, whose ranks keep what they own. `extra` goes to all, last.
    """
    common = [*common_arguments(dummy_weights), *extra]
    plain = [*(_PLAIN_GPU if num_gpus() else ()), "--tp", str(gpus), *common]
    plans = [ServerPlan(backend, ("--attention-backend", backend, *plain)) for backend in backends]
    apb = ["--prefill-backend", "apb", "--sp-size", str(gpus)]
    apb += ["--prefill-backend-config", config_text] if config_text else []
    apb += ["--attention-backend", backends[0]] if backends else []
    if bootstrap_port is not None:
        apb += ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "zmq"]
        apb += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    return [*plans, ServerPlan(APB, (*apb, *common))]


def common_arguments(dummy_weights: bool) -> list[str]:
    """What every server that is measured is started with."""
    return [*_COMMON, *(_COMMON_GPU if num_gpus() else ()), *(_DUMMY_WEIGHTS if dummy_weights else ())]


def default_backends() -> list[str]:
    """The attention backends of plain SGLang that are worth comparing with on this machine."""
    if not num_gpus():
        return ["torch_native"]
    return ["flashinfer", "fa3"] if _has_fa3() else ["flashinfer"]


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


def _has_fa3() -> bool:
    """Whether the FlashAttention 3 library is there and made for these GPUs.

    SGLang's own question imports sgl_kernel, which loads every kernel library.
    """
    import torch

    spec = find_spec("sgl_kernel")
    folders = (spec.submodule_search_locations or []) if spec else []
    is_there = any(next(Path(folder).glob("flash_ops*.so"), None) for folder in folders)
    return is_there and torch.cuda.get_device_capability()[0] in _FA3_CAPABILITIES
