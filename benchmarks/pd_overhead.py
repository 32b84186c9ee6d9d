"""What prefill/decode disaggregation adds to the time to first token: the same prompts on one server and on a cluster.

    python benchmarks/pd_overhead.py --model MODEL --output benchmarks/results/pd-overhead-cpu.json
    python benchmarks/pd_overhead.py --shape llama-3.1-8b --ranks 1 --tokens 131072 --planes cuda_ipc,zmq

Servers start in turn on this machine, all with APB on as many ranks; one output token, medians. On GPUs the decode
server has the one after the prefill ranks'. What follows -- goes to all servers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from sglang_apb.commands.bench.models import SHAPES, shape_folder
from sglang_apb.commands.bench.servers import common_arguments
from sglang_apb.commands.report import prefill_report, write_result
from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService

_STARTUP_S = 600.0


def main() -> None:
    args = _arguments()
    seconds: dict[str, list[float]] = {}
    with _model(args) as model, tempfile.TemporaryDirectory(prefix="sglang-apb-bench-") as folder:
        logs = args.log_dir or Path(folder)
        apb = ["--prefill-backend", "apb", "--sp-size", str(args.ranks), *args.server_args]
        one = LocalServer(model, port=args.port, log_dir=logs / "one", arguments=apb)
        seconds["one server"] = times(one, args.tokens, args.repeats)
        for index, plane in enumerate(args.planes.split(",")):
            transfer = ["--kv-transfer-config", json.dumps({"data_plane": plane})]
            pd = LocalCluster(
                *(model,),
                port=args.port + 20 + 10 * index,
                log_dir=logs / plane,
                sp_size=args.ranks,
                arguments=[*args.server_args, *transfer],
            )
            seconds[f"prefill/decode, {plane}"] = times(pd, args.tokens, args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median / medians["one server"] for name, median in medians.items()}
    for name, median in medians.items():
        print(f"{name:<26} {median:.3f} s to the first of 1 token after {args.tokens:,}; {ratios[name]:.3f} times")
    if args.output:
        settings = {
            "tokens": args.tokens,
            "repeats": args.repeats,
            "ranks": args.ranks,
            "server_args": args.server_args,
        }
        write_result(args.output, model=args.model or args.shape, settings=settings, seconds=seconds, ratios=ratios)


def times(service: LocalService, num_tokens: int, repeats: int) -> list[float]:
    """Seconds of each request, after one that warms up."""
    prompt = [1000 + 7 * index % 20000 for index in range(num_tokens - 1)]
    seconds = []
    with service:
        _wait_ready(service)
        for index in range(repeats + 1):
            started = time.perf_counter()
            answer = _generate(service.url, [index + 5, *prompt])
            seconds.append(time.perf_counter() - started)
    print(f"{service.groups[0].log_path.parent.name}: {prefill_report(answer)}", flush=True)
    return seconds[1:]


def _wait_ready(service: LocalService) -> None:
    """Dummy weights have no tokenizer to try a chat with."""
    deadline = time.monotonic() + _STARTUP_S
    while True:
        service.check()
        with contextlib.suppress(requests.RequestException):
            _generate(service.url, [1, 2, 3])
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {_STARTUP_S:.0f} s; logs: {service.groups[0].log_path.parent}")
        time.sleep(1)


def _generate(url: str, prompt: list[int]) -> dict:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}}
    response = requests.post(f"{url}/generate", json=body, timeout=600)
    response.raise_for_status()
    return response.json()


@contextlib.contextmanager
def _model(args: argparse.Namespace) -> Iterator[str]:
    if args.model:
        yield args.model
        return
    args.server_args = [*common_arguments(dummy_weights=True), *args.server_args]
    with shape_folder(args.shape) as folder:
        yield folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model")
    model.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--planes", default="auto", help="data_plane of the cluster's servers, comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=31500)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS")
    return parser.parse_args()


if __name__ == "__main__":
    main()
