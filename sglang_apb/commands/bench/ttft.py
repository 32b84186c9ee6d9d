"""`sglang-apb bench ttft`: time to first token of plain SGLang and of APB, on the same GPUs, one after the other.

Every server gets the same prompts of random token ids, and answers each with one token; the time is from request
to answer. What follows -- goes to all servers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_apb import layout
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import plain
from sglang_apb.commands.bench import plot as bench_plot
from sglang_apb.commands.bench import trace as bench_trace
from sglang_apb.commands.bench.arguments import count, counts
from sglang_apb.commands.bench.models import SHAPES, DecoderShape, apb_flop, exact_flop, read_config, shape_folder
from sglang_apb.commands.bench.servers import BenchServer, ServerPlan, plan_servers
from sglang_apb.commands.bench.table import APB, Timing, notes, rate_of, rate_table, ratio, ttft_table
from sglang_apb.commands.bench.timed_prompts import time_server
from sglang_apb.commands.report import write_result
from sglang_apb.commands.servers import check_ports, num_gpus
from sglang_apb.config import ApbConfig, ConfigError, parse

HELP = "time to first token, APB against plain SGLang"
_PORTS = 3  # of a server: its own, its ranks', and a prefill server's bootstrap
# What a result depends on; ports and folders are not among it.
_SETTINGS = (
    "shape",
    "lengths",
    "repeats",
    "warm_up",
    "seed",
    "gpus",
    "backends",
    "prefill_backend_config",
    "prefill_only",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="model folder, or name on the Hugging Face hub")
    model.add_argument("--shape", choices=SHAPES, help="a model of this shape with dummy weights: nothing to download")
    parser.add_argument("--lengths", type=counts, default=[8192, 32768, 131072], help="prompt tokens, comma-separated")
    parser.add_argument("--repeats", type=count, default=5, help="timed prompts a length; their median counts")
    parser.add_argument("--warm-up", type=int, default=1, help="prompts a length before those")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--gpus", type=count, help="of each server (--tp, --sp-size); all if left out, 1 on a CPU")
    parser.add_argument(
        "--backends",
        type=_names,
        help=f"plain SGLang's attention backends, and {plain.FA3_CP}: fa3 with SGLang's own context parallelism, for "
        "several GPUs and models that it supports. If left out flashinfer and, where they can run, fa3 and "
        f"{plain.FA3_CP}; torch_native on a CPU",
    )
    parser.add_argument("--prefill-backend-config", help="of the APB server")
    parser.add_argument(
        "--prefill-only",
        action="store_true",
        help="APB's as the prefill server of a pair, whose ranks keep what they own, with nobody to send it to",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="for every single time, and the settings")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="for a picture; needs matplotlib")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FOLDER",
        help="profile one more prompt a length on APB's server, into this folder",
    )
    parser.add_argument("--port", type=int, default=30200, help="the first server's; each takes three")
    parser.add_argument("--log-dir", type=Path, help="logs/bench-DATE-TIME if left out")
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for all servers")


def run(args: argparse.Namespace) -> int:
    model_config = SHAPES[args.shape] if args.shape else read_config(args.model)
    config = _complete(args, model_config)
    with _model(args) as model:
        plans = _plans(args)
        ports = [args.port + _PORTS * index for index in range(len(plans))]
        check_ports({f"{plan.name} server": port for plan, port in zip(plans, ports, strict=True)})
        work = _work(DecoderShape.of(model_config), config, args.gpus)
        timings: list[Timing] = []
        for plan, port in zip(plans, ports, strict=True):
            _say(f"starting the {plan.name} server, log in {args.log_dir / plan.name}")
            server = BenchServer(
                model, port=port, log_dir=args.log_dir / plan.name, arguments=plan.arguments, report=_say
            )
            timings += time_server(server, plan.name, args, _vocab_size(model_config))
            if args.output:  # after each server: what is measured stays when the run is interrupted
                _write(args, plans, timings, work)
    print(describe(timings, work, args.gpus))
    if args.trace:
        print(describe_traces(args.trace, args.lengths))
    if args.output:
        print(f"written to {args.output}")
    if args.plot:
        bench_plot.write(args.plot, timings, f"{_model_name(args)}, {_place(args.gpus)}")
        print(f"drawn in {args.plot}")
    if all(timing.median is None for timing in timings):
        raise CommandError(f"no server gave a figure; logs: {args.log_dir}")
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


def _complete(args: argparse.Namespace, model_config: Mapping[str, Any]) -> ApbConfig:
    """Fills in what depends on this machine, and refuses at once what would fail later. Raises CommandError."""
    available = num_gpus()
    args.gpus = args.gpus or available or 1
    if available and args.gpus > available:
        raise CommandError(f"--gpus {args.gpus}: this machine has {available}")
    if args.warm_up < 0:
        raise CommandError(f"--warm-up must be at least 0, not {args.warm_up}")
    architecture = (model_config.get("architectures") or ["an unknown architecture"])[0]
    if args.backends is None:
        args.backends = plain.default_backends(args.gpus, architecture)
    plain.check_backends(args.backends, args.gpus, architecture)
    if args.plot:
        bench_plot.check(args.plot)
    args.log_dir = args.log_dir or Path("logs") / time.strftime("bench-%Y%m%d-%H%M%S")
    try:
        return parse(args.prefill_backend_config)
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _plans(args: argparse.Namespace) -> list[ServerPlan]:
    return plan_servers(
        args.backends,
        gpus=args.gpus,
        dummy_weights=args.shape is not None,
        config_text=args.prefill_backend_config,
        bootstrap_port=args.port + _PORTS * len(args.backends) + 2 if args.prefill_only else None,
        extra=args.server_args,
    )


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[str]:
    if args.shape is None:
        yield args.model
        return
    with shape_folder(args.shape) as folder:
        yield folder


def _vocab_size(model_config: Mapping[str, Any]) -> int:
    """Models that also see or hear keep the language model's sizes in a part of their own."""
    return (model_config.get("text_config") or model_config)["vocab_size"]


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
    environment = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    write_result(
        args.output,
        model=_model_name(args),
        settings={name: getattr(args, name) for name in _SETTINGS} | {"environment": environment},
        servers={plan.name: list(plan.arguments) for plan in plans},
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


def _model_name(args: argparse.Namespace) -> str:
    return f"{args.shape}, dummy weights" if args.shape else Path(args.model).name


def _place(gpus: int) -> str:
    import torch

    return f"{gpus} x {torch.cuda.get_device_name(0)}" if num_gpus() else f"{gpus} CPU rank(s)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
