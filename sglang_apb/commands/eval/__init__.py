"""`sglang-apb eval`: how good answers are after a sparse prefill, beside exact attention's; a module a kind.

A kind has `HELP`, `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

HELP = "measure how good answers are, against exact attention"
KINDS = {
    "ruler": "sglang_apb.commands.eval.ruler",
    "infinitebench": "sglang_apb.commands.eval.infinitebench",
    "needles": "sglang_apb.commands.eval.needles",
    "prompts": "sglang_apb.commands.eval.prompts",
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
