"""`sglang-apb bench`: measurements of speed, a module each: `HELP`, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse

from sglang_apb.commands import add_modules

HELP = "measure how fast this is, against plain SGLang on the same machine"
KINDS = {
    "ttft": "sglang_apb.commands.bench.ttft",
    "reuse": "sglang_apb.commands.bench.reuse",
    "mixed": "sglang_apb.commands.bench.mixed",
    "kernels": "sglang_apb.commands.bench.kernels",
    "layer": "sglang_apb.commands.bench.layer",
    "transfer": "sglang_apb.commands.bench.transfer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modules(parser, "kind", KINDS)
