"""What prefill/decode disaggregation adds to the time to first token: the same prompts on one server and on a cluster.

    python benchmarks/pd_overhead.py --model MODEL --output benchmarks/results/pd-overhead-cpu.json

Servers start in turn on this machine, both with APB on two ranks; one output token, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import requests

from sglang_apb.commands.report import write_result
from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService

APB = ("--prefill-backend", "apb", "--sp-size", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=31500)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    prompt = [1000 + 7 * index % 20000 for index in range(args.tokens)]
    with tempfile.TemporaryDirectory(prefix="sglang-apb-bench-") as logs:
        one = LocalServer(args.model, port=args.port, log_dir=Path(logs) / "one", arguments=list(APB))
        pd = LocalCluster(args.model, port=args.port + 20, log_dir=Path(logs) / "pd", sp_size=2)
        seconds = {"one server": times(one, prompt, args.repeats), "prefill/decode": times(pd, prompt, args.repeats)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["prefill/decode"] / medians["one server"]
    for name, median in medians.items():
        print(f"{name:<16} {median:.2f} s to the first of 1 token after {args.tokens:,}")
    print(f"prefill/decode takes {ratio:.3f} times as long")
    if args.output:
        settings = {"tokens": args.tokens, "repeats": args.repeats, "ranks": 2}
        write_result(args.output, model=args.model, settings=settings, seconds=seconds, ratio=ratio)


def times(service: LocalService, prompt: list[int], repeats: int) -> list[float]:
    """Seconds of each request, after one that warms up."""
    seconds = []
    with service:
        service.wait_ready(timeout=600)
        for index in range(repeats + 1):
            body = {"input_ids": [index + 5, *prompt], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            started = time.perf_counter()
            requests.post(f"{service.url}/generate", json=body, timeout=600).raise_for_status()
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
