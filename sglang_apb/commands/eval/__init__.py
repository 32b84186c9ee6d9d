"""`sglang-apb eval`: how good answers are after a sparse prefill, beside exact attention's; a module a kind.

A kind has `HELP`, `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import argparse

from sglang_apb.commands import add_modules

HELP = "measure how good answers are, against exact attention"
KINDS = {
    "ruler": "sglang_apb.commands.eval.ruler",
    "infinitebench": "sglang_apb.commands.eval.infinitebench",
    "needles": "sglang_apb.commands.eval.needles",
    "prompts": "sglang_apb.commands.eval.prompts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modules(parser, "kind", KINDS)
