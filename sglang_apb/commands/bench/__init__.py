"""`sglang-apb bench`: measurements of speed, a module each: `HELP`, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
from importlib import import_module

HELP = "measure how fast this is, against plain SGLang on the same machine"
KINDS = {
    "ttft": "sglang_apb.commands.bench.ttft",
    "kernels": "sglang_apb.commands.bench.kernels",
    "layer": "sglang_apb.commands.bench.layer",
    "transfer": "sglang_apb.commands.bench.transfer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module_name in KINDS.items():
        module = import_module(module_name)
        kind = kinds.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(kind)
        kind.set_defaults(run_kind=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_kind(args)
