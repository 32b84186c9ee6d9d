"""`sglang-apb bench transfer`: a prompt's KV from one process to another on this machine, beside other ways to send it.

Both processes hold a KV pool, and decode has asked for a prompt's KV, as it has in a server when the prefill ends.
Times are from then to the last byte, in place. What the others are compared with has nothing to gather, check or place:
a raw socket, and between GPUs one NCCL call for everything.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sglang_apb.commands.bench.arguments import count
from sglang_apb.commands.bench.table import markdown
from sglang_apb.commands.bench.transfer_prompts import PLAIN_NCCL, PROMPTS, RAW, Time
from sglang_apb.commands.report import write_result

HELP = "KV from process to process, against a raw socket and Mooncake; of GPUs, against NCCL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=["smollm2", "1gb"], help="whose KV to send")
    parser.add_argument(
        "--ways", nargs="+", metavar="NAME", help="only those whose names begin so, and what they are compared with"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where both pools are; cuda: on two GPUs, or on the one there is",
    )
    parser.add_argument("--repeats", type=count, default=7, help="of each turn; the median of all counts")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="for all figures, and the settings")


def run(args: argparse.Namespace) -> int:
    from sglang_apb.commands.bench.transfer_peers import time_ways

    times: list[Time] = []
    notes: list[str] = []
    for name in args.prompts:
        found, more = time_ways(PROMPTS[name], args.repeats, args.device, tuple(args.ways or [""]))
        times += found
        notes += [note for note in more if note not in notes]
    print("\n".join(["", describe(times), "", *(f"- {note}" for note in notes)]))
    if args.output:
        settings = {"prompts": args.prompts, "repeats": args.repeats, "device": args.device}
        results = [asdict(time) | {"gb_per_s": time.gb_per_s} for time in times]
        write_result(args.output, model=None, settings=settings, notes=notes, results=results)
        print(f"written to {args.output}")
    return 0


def describe(times: Sequence[Time]) -> str:
    """The table: a row for each prompt and way, with its rate as a share of the raw socket's or NCCL's."""
    base = PLAIN_NCCL if any(time.way == PLAIN_NCCL for time in times) else RAW
    of_base = {time.prompt: time.gb_per_s for time in times if time.way == base}
    rows = [
        [
            time.prompt,
            time.way,
            f"{time.num_bytes / 1e6:,.0f}",
            f"{statistics.median(time.seconds) * 1e3:.1f}",
            f"{time.gb_per_s:.2f}",
            f"{time.gb_per_s / of_base[time.prompt]:.2f}" if time.prompt in of_base else "",
        ]
        for time in times
    ]
    return markdown(["KV of", "way", "MB", "ms", "GB/s", f"of {base}"], rows)
