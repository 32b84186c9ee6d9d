"""SmolLM2 on real servers, on GPUs or a CPU: do all ways of serving give plain SGLang's tokens, and a CPU's?

    python benchmarks/gpu_check.py MODEL_DIR LOG_DIR [--ways plain,apb-1,...] [--record FILE] [--against FILE]
        [-- SERVER ARGUMENTS]

Ways ending in a number of ranks: `apb` and `pd` (with disaggregation) hand everything on, which is exact attention,
and are compared with plain SGLang; `default` has APB's own lengths. With `--against` every way is compared with its
answers in a file that `--record` wrote, on another machine perhaps. Where answers part, both tokens' log-probabilities
are shown: bfloat16 decides between near-equal ones by rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from asking import ALL_PASSED, Answer, generate, prompts

from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService, ServiceError

LENGTHS = (1000, 1300, 1700, 2200, 3000)
COMMON = ("--cuda-graph-max-bs-decode", "4")  # few graphs are captured sooner; one prompt is asked at a time
OWN_LENGTHS = '{"min_tokens": 512}'


def ways(model: str, log_dir: Path, extra: list[str]) -> dict[str, LocalService]:
    common = [*COMMON, *extra]

    def server(port: int, config: str | None = None, num_ranks: int = 1) -> LocalServer:
        apb = ["--prefill-backend", "apb", "--sp-size", str(num_ranks), "--prefill-backend-config", config]
        return LocalServer(model, port=port, log_dir=log_dir / str(port), arguments=[*common, *(apb if config else [])])

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
        "apb-1": server(33010, ALL_PASSED),
        "apb-2": server(33020, ALL_PASSED, 2),
        "default-1": server(33030, OWN_LENGTHS),
        "default-2": server(33040, OWN_LENGTHS, 2),
        "pd-1": cluster(33050, 1),
        "pd-2": cluster(33060, 2),
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
    parted = [
        f"prompt {number} at token {place} ({a.logprobs[place]:.3f}, {b.logprobs[place]:.3f})"
        for number, (a, b, place) in enumerate(zip(found, wanted, places, strict=True))
        if place is not None
    ]
    equal = f"{places.count(None)} of {len(places)} equal"
    return f"{equal}; logprobs within {worst:.3f}{''.join(f'; {part}' for part in parted)}"


def read(path: Path) -> dict[str, list[Answer]]:
    recorded = json.loads(path.read_text())["answers"]
    return {
        way: [Answer(**{**answer, "token_ids": tuple(answer["token_ids"])}) for answer in answers]
        for way, answers in recorded.items()
    }


def ask(service: LocalService, asked: list[list[int]]) -> list[Answer]:
    with service:
        service.wait_ready(timeout=400)
        return [generate(service.url, prompt) for prompt in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("log_dir", type=Path)
    parser.add_argument("--ways", default="plain,apb-1,apb-2,default-1,default-2,pd-1,pd-2")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--against", type=Path)
    own, _, for_servers = "\0".join(sys.argv[1:]).partition("\0--\0")
    args = parser.parse_args(own.split("\0"))
    server_args = for_servers.split("\0") if for_servers else []
    asked = prompts(Path(args.model), LENGTHS)
    services = ways(args.model, args.log_dir, server_args)
    before = read(args.against) if args.against else {}
    answers: dict[str, list[Answer]] = {}
    for way in args.ways.split(","):
        started = time.monotonic()
        try:
            answers[way] = ask(services[way], asked)
        except (ServiceError, AssertionError, OSError) as error:
            print(f"RESULT {way}: failed: {error}", flush=True)
            continue
        print(f"RESULT {way}: {answers[way][-1].prefill} ({time.monotonic() - started:.0f} s)", flush=True)
        if "plain" in answers and way.startswith(("apb", "pd")):
            print(f"    beside plain: {describe(answers[way], answers['plain'])}", flush=True)
        if way in before:
            print(f"    beside {args.against.name}: {describe(answers[way], before[way])}", flush=True)
    if args.record:
        _write(args.record, server_args, answers)


def _write(path: Path, server_args: list[str], answers: dict[str, list[Answer]]) -> None:
    result: dict[str, Any] = {"lengths": LENGTHS, "server_args": server_args}
    result["answers"] = {way: [asdict(answer) for answer in given] for way, given in answers.items()}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
