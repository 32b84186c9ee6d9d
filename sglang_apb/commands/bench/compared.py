"""What the kinds of bench that compare servers are told alike, and how they go through them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import plain
from sglang_apb.commands.bench import plot as bench_plot
from sglang_apb.commands.bench.arguments import count
from sglang_apb.commands.bench.models import SHAPES, read_config, shape_folder
from sglang_apb.commands.bench.servers import BenchServer, ServerPlan, plan_servers
from sglang_apb.commands.report import write_result
from sglang_apb.commands.servers import check_ports, num_gpus
from sglang_apb.config import ApbConfig, ConfigError, parse

_PORTS = 3  # of a server: its own, its ranks', and a prefill server's bootstrap
# What a result depends on; ports and folders are not among it.
_SETTINGS = ("shape", "seed", "gpus", "backends", "prefill_backend_config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="model folder, or name on the Hugging Face hub")
    model.add_argument("--shape", choices=SHAPES, help="a model of this shape with dummy weights: nothing to download")
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
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="for every single time, and the settings")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="for a picture; needs matplotlib")
    parser.add_argument("--port", type=int, default=30200, help="the first server's; each takes three")
    parser.add_argument("--log-dir", type=Path, help="logs/bench-DATE-TIME if left out")
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for all servers")


def complete(args: argparse.Namespace) -> tuple[Mapping[str, Any], ApbConfig]:
    """The model's configuration and APB's. Fills in what depends on this machine, and refuses at once what would fail
    later. Raises CommandError.
    """
    model_config = SHAPES[args.shape] if args.shape else read_config(args.model)
    available = num_gpus()
    args.gpus = args.gpus or available or 1
    if available and args.gpus > available:
        raise CommandError(f"--gpus {args.gpus}: this machine has {available}")
    architecture = (model_config.get("architectures") or ["an unknown architecture"])[0]
    if args.backends is None:
        args.backends = plain.default_backends(args.gpus, architecture)
    plain.check_backends(args.backends, args.gpus, architecture)
    if args.plot:
        bench_plot.check(args.plot)
    args.log_dir = args.log_dir or Path("logs") / time.strftime("bench-%Y%m%d-%H%M%S")
    try:
        return model_config, parse(args.prefill_backend_config)
    except ConfigError as error:
        raise CommandError(str(error)) from error


@contextmanager
def model_of(args: argparse.Namespace) -> Iterator[str]:
    """Its folder or name."""
    if args.shape is None:
        yield args.model
        return
    with shape_folder(args.shape) as folder:
        yield folder


def plans_of(
    args: argparse.Namespace,
    *,
    prefill_only: bool = False,
    plain_options: Mapping[str, Sequence[str]] | None = None,
    more: Sequence[str] = (),
) -> list[ServerPlan]:
    """`plain_options` as in `plan_servers`; `more` goes to all. Raises CommandError when a port is taken."""
    plans = plan_servers(
        args.backends,
        gpus=args.gpus,
        dummy_weights=args.shape is not None,
        config_text=args.prefill_backend_config,
        bootstrap_port=args.port + _PORTS * len(args.backends) + 2 if prefill_only else None,
        plain_options=plain_options,
        extra=[*more, *args.server_args],
    )
    check_ports({f"{plan.name} server": args.port + _PORTS * index for index, plan in enumerate(plans)})
    return plans


def servers_of(args: argparse.Namespace, plans: Sequence[ServerPlan], model: str) -> Iterator[tuple[str, BenchServer]]:
    """Each with its name, not started."""
    for index, plan in enumerate(plans):
        say(f"starting the {plan.name} server, log in {args.log_dir / plan.name}")
        port, log_dir = args.port + _PORTS * index, args.log_dir / plan.name
        yield plan.name, BenchServer(model, port=port, log_dir=log_dir, arguments=plan.arguments, report=say)


def write(args: argparse.Namespace, plans: Sequence[ServerPlan], settings: Sequence[str], **content: Any) -> None:
    """`settings`: names of the kind's own among `args`."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    write_result(
        args.output,
        model=model_name(args),
        settings={name: getattr(args, name) for name in (*_SETTINGS, *settings)} | {"environment": environment},
        servers={plan.name: list(plan.arguments) for plan in plans},
        **content,
    )


def finish(args: argparse.Namespace, draw: Callable[[Path, str], None], *, has_figures: bool) -> None:
    """Says where results are; `draw` makes the picture, of a path and a title. Raises CommandError without figures."""
    if args.output:
        print(f"written to {args.output}")
    if args.plot:
        draw(args.plot, f"{model_name(args)}, {place(args.gpus)}")
        print(f"drawn in {args.plot}")
    if not has_figures:
        raise CommandError(f"no server gave a figure; logs: {args.log_dir}")


def vocab_size(model_config: Mapping[str, Any]) -> int:
    """Models that also see or hear keep the language model's sizes in a part of their own."""
    return int((model_config.get("text_config") or model_config)["vocab_size"])


def model_name(args: argparse.Namespace) -> str:
    return f"{args.shape}, dummy weights" if args.shape else Path(args.model).name


def place(gpus: int) -> str:
    import torch

    return f"{gpus} x {torch.cuda.get_device_name(0)}" if num_gpus() else f"{gpus} CPU rank(s)"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
