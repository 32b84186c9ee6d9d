"""`sglang-apb bench ttft`: time to first token of plain SGLang and of APB, on the same GPUs, one after the other.

Every server gets the same prompts of random token ids, and answers each with one token; the time is from request
to answer. What follows -- goes to all servers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from sglang_apb import layout
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import compared
from sglang_apb.commands.bench import plot as bench_plot
from sglang_apb.commands.bench import trace as bench_trace
from sglang_apb.commands.bench.arguments import count, counts
from sglang_apb.commands.bench.models import DecoderShape, apb_flop, exact_flop
from sglang_apb.commands.bench.servers import ServerPlan
from sglang_apb.commands.bench.table import APB, Timing, notes, rate_of, rate_table, ratio, ttft_table
from sglang_apb.commands.bench.timed_prompts import time_server
from sglang_apb.commands.servers import num_gpus
from sglang_apb.config import ApbConfig

HELP = "time to first token, APB against plain SGLang"
# Of its own, what a result depends on.
_SETTINGS = ("lengths", "repeats", "warm_up", "prefill_only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compared.add_arguments(parser)
    parser.add_argument("--lengths", type=counts, default=[8192, 32768, 131072], help="prompt tokens, comma-separated")
    parser.add_argument("--repeats", type=count, default=5, help="timed prompts a length; their median counts")
    parser.add_argument("--warm-up", type=int, default=1, help="prompts a length before those")
    parser.add_argument(
        "--prefill-only",
        action="store_true",
        help="APB's as the prefill server of a pair, whose ranks keep what they own, with nobody to send it to",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FOLDER",
        help="profile one more prompt a length on APB's server, into this folder",
    )


def run(args: argparse.Namespace) -> int:
    if args.warm_up < 0:
        raise CommandError(f"--warm-up must be at least 0, not {args.warm_up}")
    model_config, config = compared.complete(args)
    with compared.model_of(args) as model:
        plans = compared.plans_of(args, prefill_only=args.prefill_only)
        work = _work(DecoderShape.of(model_config), config, args.gpus)
        timings: list[Timing] = []
        for name, server in compared.servers_of(args, plans, model):
            timings += time_server(server, name, args, compared.vocab_size(model_config))
            if args.output:  # after each server: what is measured stays when the run is interrupted
                _write(args, plans, timings, work)
    print(describe(timings, work, args.gpus))
    if args.trace:
        print(describe_traces(args.trace, args.lengths))
    has_figures = any(timing.median is not None for timing in timings)
    compared.finish(args, lambda path, title: bench_plot.write(path, timings, title), has_figures=has_figures)
    return 0


def describe(timings: Sequence[Timing], work: Callable[[Timing], int | None], gpus: int) -> str:
    """The tables and what is to be said of them."""
    parts = [
        ttft_table(timings),
        "\n".join(f"- {note}" for note in notes(timings)),
        rate_table(timings, work, gpus, "GPU" if num_gpus() else "rank"),
    ]
    return "\n\n".join(["", *filter(None, parts)])


def describe_traces(folder: Path, lengths: Sequence[int]) -> str:
    """What the traces of each length say; of a prompt on the exact path they say nothing."""
    parts = []
    for length in lengths:
        files = sorted((folder / str(length)).glob("*.trace.json.gz"))
        try:
            said = bench_trace.describe([bench_trace.read(file) for file in files]) if files else "no trace"
        except CommandError as error:
            said = str(error)
        parts.append(f"{length:,} tokens, profiled: {folder / str(length)}\n\n{said}")
    return "\n\n".join(["", *parts])


def _work(shape: DecoderShape | None, config: ApbConfig, gpus: int) -> Callable[[Timing], int | None]:
    """The function that gives a prompt's floating-point operations, None where they cannot be counted."""

    def flop(timing: Timing) -> int | None:
        if shape is None:
            return None
        if timing.prefill.get("method") == APB:
            plan = layout.plan(timing.length, config, num_ranks=gpus)
            return apb_flop(shape, plan, one_pass=config.order == "one_pass")
        return exact_flop(shape, timing.length)

    return flop


def _write(
    args: argparse.Namespace,
    plans: Sequence[ServerPlan],
    timings: Sequence[Timing],
    work: Callable[[Timing], int | None],
) -> None:
    rates = [rate_of(timing, work(timing), args.gpus) for timing in timings]
    compared.write(
        args,
        plans,
        _SETTINGS,
        results=[
            {
                "length": length,
                "median_s": {timing.server: timing.median for timing in timings if timing.length == length},
                "best_plain_over_apb": ratio(timings, length),
            }
            for length in args.lengths
        ],
        timings=[
            asdict(timing) | {"median_s": timing.median, "rate": rate and asdict(rate)}
            for timing, rate in zip(timings, rates, strict=True)
        ],
    )
