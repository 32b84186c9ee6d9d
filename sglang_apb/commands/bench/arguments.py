"""What kinds of bench are told alike: prompts, model, engine, where results go. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from sglang_apb.commands.bench.models import SHAPES
from sglang_apb.config import ENGINES

DTYPES = ("bfloat16", "float16", "float32")


def count(text: str) -> int:
    """A whole number from 1 on, as argparse's `type`."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def counts(text: str) -> list[int]:
    """Ascending: a length that is too much must not cost the shorter ones."""
    return sorted({count(part) for part in text.split(",")})


def choices(text: str, known: Collection[str]) -> list[str]:
    """Some of `known`, comma-separated, each once; with `known` bound, as argparse's `type`."""
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return chosen


def add_in_process_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="sizes of the model")
    model.add_argument("--model", help="the same from a model's config.json: folder, or name on the Hugging Face hub")
    parser.add_argument("--lengths", type=counts, default=[32768, 131072], help="prompt tokens, comma-separated")
    parser.add_argument("--prefill-backend-config", help="as the server's option")
    parser.add_argument("--engine", choices=ENGINES, help="of the two that can here the faster if left out")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on CUDA, float32 on a CPU if left out")
    parser.add_argument("--repeats", type=count, default=10, help="of which the median counts")
    parser.add_argument("--warm-up", type=int, default=3, help="runs before those")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="for all figures, and the settings")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="for a picture; needs matplotlib")


def model_name(args: argparse.Namespace) -> str:
    return Path(args.model).name if args.model else args.shape
