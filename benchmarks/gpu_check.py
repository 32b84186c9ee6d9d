"""Runs SmolLM2 on one and two GPUs through real servers and compares with plain SGLang there.

    python benchmarks/gpu_check.py MODEL_DIR LOG_DIR [--ways plain,apb-1,...] [-- SERVER ARGUMENTS]

Prints, for each way of serving, how many of the prompts got plain SGLang's tokens with everything passed on,
and where the others part (bf16 rounds differently from one number of ranks to the next).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from asking import ALL_PASSED, Answer, generate, prompts

from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService, ServiceError

LENGTHS = (1000, 1300, 1700, 2200, 3000)
COMMON = ("--grammar-backend", "none", "--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "4")
APB = ("--prefill-backend", "apb", "--prefill-backend-config", ALL_PASSED)


def ways(model: str, log_dir: Path, extra: list[str]) -> dict[str, LocalService]:
    """The services to compare; the first one is what the others are compared with."""
    common = [*COMMON, *extra]

    def server(port: int, *arguments: str) -> LocalServer:
        return LocalServer(model, port=port, log_dir=log_dir / str(port), arguments=[*common, *arguments])

    def cluster(port: int, num_ranks: int) -> LocalCluster:
        return LocalCluster(
            model,
            port=port,
            log_dir=log_dir / str(port),
            sp_size=num_ranks,
            arguments=common,
            prefill_arguments=["--prefill-backend-config", ALL_PASSED],
        )

    return {
        "plain": server(33000),
        "apb-1": server(33010, *APB),
        "apb-2": server(33020, *APB, "--sp-size", "2"),
        "pd-1": cluster(33030, 1),
        "pd-2": cluster(33040, 2),
    }


def first_difference(found: Answer, wanted: Answer) -> int | None:
    """The number of the first output token that differs."""
    pairs = zip(found.token_ids, wanted.token_ids, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def describe(found: list[Answer], wanted: list[Answer]) -> str:
    places = [first_difference(a, b) for a, b in zip(found, wanted, strict=True)]
    worst = max(
        abs(x - y)
        for a, b, place in zip(found, wanted, places, strict=True)
        for x, y in list(zip(a.logprobs, b.logprobs, strict=True))[:place]
    )
    parted = [place for place in places if place is not None]
    return f"{places.count(None)} of {len(places)} equal, others part at token {parted}, logprobs within {worst:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("log_dir", type=Path)
    parser.add_argument("--ways", default="plain,apb-1,apb-2,pd-1,pd-2")
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS")
    args = parser.parse_args()
    asked = prompts(Path(args.model), LENGTHS)
    services = ways(args.model, args.log_dir, args.server_args)
    plain: list[Answer] = []
    for name in args.ways.split(","):
        started = time.monotonic()
        try:
            with services[name] as service:
                service.wait_ready(timeout=240)
                answers = [generate(service.url, prompt) for prompt in asked]
        except (ServiceError, AssertionError, OSError) as error:
            print(f"RESULT {name}: failed: {error}", flush=True)
            continue
        plain = plain or answers
        took = time.monotonic() - started
        print(f"RESULT {name}: {describe(answers, plain)}; {answers[-1].prefill} ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
