"""Runs SmolLM2 on one and two GPUs through real servers and compares with plain SGLang there.

    python benchmarks/gpu_check.py MODEL_DIR LOG_DIR [SERVER ARGUMENTS]

Prints, for each way of serving, how many of the prompts got plain SGLang's tokens with everything passed on,
and where the others part (bf16 rounds differently from one number of ranks to the next).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from asking import ALL_PASSED, Answer, generate, prompts

from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService

LENGTHS = (1000, 1300, 1700, 2200, 3000)
COMMON = ("--grammar-backend", "none", "--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "4", *sys.argv[3:])
APB = ("--prefill-backend", "apb", "--prefill-backend-config", ALL_PASSED)


def ways(model: str, log_dir: Path) -> dict[str, LocalService]:
    def server(port: int, *arguments: str) -> LocalServer:
        return LocalServer(model, port=port, log_dir=log_dir / str(port), arguments=[*COMMON, *arguments])

    def cluster(port: int, num_ranks: int) -> LocalCluster:
        config = ["--prefill-backend-config", ALL_PASSED]
        return LocalCluster(
            model,
            port=port,
            log_dir=log_dir / str(port),
            sp_size=num_ranks,
            arguments=COMMON,
            prefill_arguments=config,
        )

    return {
        "plain SGLang": server(33000),
        "apb, 1 GPU": server(33010, *APB),
        "apb, 2 GPUs": server(33020, *APB, "--sp-size", "2"),
        "prefill on 1 GPU, decode on another": cluster(33030, 1),
        "prefill on 2 GPUs, decode beside it": cluster(33040, 2),
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
    model, log_dir = sys.argv[1], Path(sys.argv[2])
    asked = prompts(Path(model), LENGTHS)
    plain: list[Answer] = []
    for name, service in ways(model, log_dir).items():
        started = time.monotonic()
        try:
            with service:
                service.wait_ready(timeout=240)
                answers = [generate(service.url, prompt) for prompt in asked]
        except Exception as error:
            print(f"RESULT {name}: failed: {error}", flush=True)
            continue
        plain = plain or answers
        took = time.monotonic() - started
        print(f"RESULT {name}: {describe(answers, plain)}; {answers[-1].prefill} ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
