"""`sglang-apb bench mixed`: short prompts beside long ones, on plain SGLang and on APB, on the same GPUs, one after the
other.

    beside    one very long prompt, and short ones at a steady rate until it has its first token
    crowd     long prompts of different lengths, one for each length at any time, and short ones at a steady rate

Plain SGLang is asked as it comes and with its options for such a load (`shortest-first`). Prompts are random token ids,
streamed, and no two begin alike. What follows -- goes to all servers.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import requests

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import compared
from sglang_apb.commands.bench.arguments import choices, count, counts
from sglang_apb.commands.bench.load import Load, Streamed, at_most, between_tokens, first_token
from sglang_apb.commands.bench.servers import BenchServer
from sglang_apb.commands.bench.table import APB, NO_FIGURE, markdown, shown_ratio, shown_seconds
from sglang_apb.commands.bench.timed_prompts import ask, random_prompt
from sglang_apb.commands.servers import num_gpus

HELP = "short prompts beside long ones: who waits for whom, APB against plain SGLang"
LOADS = BESIDE, CROWD = "beside", "crowd"
SHORT, LONG = "short", "long"
SHORTEST_FIRST = "-shortest-first"
_SETTINGS = (
    *("loads", "long_prompt", "beside_rate", "beside_seconds"),
    *("long_prompts", "rate", "seconds", "deadline", "short_prompt", "output_tokens"),
)
# SGLang's chunks as they come: between two of them, not inside, others may run.
_PLAIN_OPTIONS: Mapping[str, Sequence[str]] = {
    "": (),
    SHORTEST_FIRST: (
        *("--schedule-policy", "shortest-prefill-first"),
        *("--prefill-decode-interval", "1", "--prefill-decode-interval-min-bs", "1"),
    ),
}
_MORE_GPU = ("--max-running-requests", "64", "--cuda-graph-max-bs-decode", "32", "--cuda-graph-max-bs-prefill", "2048")
_WARM_UP, _LONG = 1 << 21, 1 << 22

Prompts = Callable[[int, int], list[int]]  # of a length and a number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compared.add_arguments(parser)
    parser.add_argument("--loads", type=_loads, default=list(LOADS), help="comma-separated; both if left out")
    parser.add_argument("--long-prompt", type=count, default=524288, help=f"tokens of the long one ({BESIDE})")
    parser.add_argument("--beside-rate", type=float, default=2.0, help="short prompts a second beside it")
    parser.add_argument("--beside-seconds", type=count, default=180, help="after which the long prompt is given up")
    parser.add_argument(
        "--long-prompts",
        type=counts,
        default=[16384, 24576, 32768, 40960, 49152, 65536, 81920, 98304, 114688, 131072],
        help=f"tokens of each; one that is answered is followed by another one ({CROWD})",
    )
    parser.add_argument("--rate", type=float, default=8.0, help=f"short prompts a second ({CROWD})")
    parser.add_argument("--seconds", type=count, default=120, help=f"of asking ({CROWD})")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds to the first token that are good enough")
    parser.add_argument("--short-prompt", type=count, default=1024, help="tokens of each short one")
    parser.add_argument("--output-tokens", type=count, default=32, help="of each answer")


def _loads(text: str) -> list[str]:
    return choices(text, LOADS)


def run(args: argparse.Namespace) -> int:
    if min(args.rate, args.beside_rate, args.deadline) <= 0:
        raise CommandError("--rate, --beside-rate and --deadline must be above 0")
    model_config, _ = compared.complete(args)
    prompts = partial(_prompt, args.seed, compared.vocab_size(model_config))
    streamed: dict[str, dict[str, list[Streamed]]] = {}
    reasons: list[str] = []
    with compared.model_of(args) as model:
        more = _MORE_GPU if num_gpus() else ()
        plans = compared.plans_of(args, plain_options=_PLAIN_OPTIONS, more=more)
        for name, server in compared.servers_of(args, plans, model):
            try:
                _load_server(server, prompts, args, streamed.setdefault(name, {}))
            except CommandError as error:  # of this server only: the others are still worth their time
                reasons.append(f"- {name}: {error}")
            if args.output:
                compared.write(args, plans, _SETTINGS, results=_as_json(streamed), reasons=reasons)
    print("\n\n".join(["", *describe(streamed, args), *reasons]))
    compared.finish(args, partial(draw, streamed, args.deadline), has_figures=any(streamed.values()))
    return 0


def _load_server(server: BenchServer, prompts: Prompts, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Starts it, puts each load on it, and ends it. Raises CommandError."""
    with server:
        server.wait_ready()
        try:
            for length in (args.short_prompt, args.long_prompts[-1]):
                ask(server.url, prompts(length, _WARM_UP), {})
        except requests.RequestException as error:
            server.raise_why(error)
        for name in args.loads:
            compared.say(f"{name}: {args.beside_seconds if name == BESIDE else args.seconds} s at most")
            load = Load(server.url, args.output_tokens)
            asyncio.run(_run(load, (_beside if name == BESIDE else _crowd)(load, prompts, args)))
            server.check()
            found[name] = load.streamed


async def _run(load: Load, work: Awaitable[None]) -> None:
    async with load.connected():
        await work


async def _beside(load: Load, prompts: Prompts, args: argparse.Namespace) -> None:
    long = asyncio.create_task(load.ask(LONG, prompts(args.long_prompt, _LONG)))
    short = partial(prompts, args.short_prompt)
    both = asyncio.gather(long, load.ask_steadily(SHORT, short, args.beside_rate, long.done))
    await at_most(args.beside_seconds, both)


async def _crowd(load: Load, prompts: Prompts, args: argparse.Namespace) -> None:
    """Until its time is over nobody is left waiting by us; then whoever was asked last has until the deadline."""

    def is_over() -> bool:
        return load.seconds >= args.seconds

    async def ask_one_after_the_other(length: int, place: int) -> None:
        for number in range(_LONG + place, 2 * _LONG, len(args.long_prompts)):
            if is_over() or (await load.ask(LONG, prompts(length, number))).reason is not None:
                return

    longs = [ask_one_after_the_other(length, place) for place, length in enumerate(args.long_prompts)]
    steady = load.ask_steadily(SHORT, partial(prompts, args.short_prompt), args.rate, is_over)
    await at_most(args.seconds + args.deadline, asyncio.gather(steady, *longs))


def describe(streamed: Mapping[str, Mapping[str, Sequence[Streamed]]], args: argparse.Namespace) -> list[str]:
    """A table for each load, with a row for each server and kind of prompt, and what was refused."""
    parts = []
    for load in dict.fromkeys(load for loads in streamed.values() for load in loads):
        rows = []
        for server, loads in streamed.items():
            asked = loads.get(load, [])
            by_kind = {kind: [one for one in asked if one.kind == kind] for kind in (LONG, SHORT)}
            rows += [[server, kind, *_cells(ones, asked, args.deadline)] for kind, ones in by_kind.items() if ones]
        columns = ["asked", f"within {args.deadline:g} s", "answers a second", "first token, median", "95%"]
        parts.append(markdown([load, "prompts", *columns, "between tokens, median", "95%"], rows))
        parts.append(
            f"{load}, first tokens within {args.deadline:g} s, apb / best plain: {_ratio(streamed, load, args)}"
        )
        refused = {
            f"- {server}, {load}: {one.reason}"
            for server, loads in streamed.items()
            for one in loads.get(load, [])
            if one.reason is not None
        }
        parts += sorted(refused)
    return parts


def _cells(ones: Sequence[Streamed], asked: Sequence[Streamed], deadline: float) -> list[str]:
    """`ones` of all that were `asked`."""
    seconds = max(one.asked + one.waited for one in asked)
    answered = sum(one.first is not None for one in ones)
    times = [str(first_token(ones, share)) for share in (0.5, 0.95)]
    gaps = [shown_seconds(between_tokens(ones, share)) for share in (0.5, 0.95)]
    return [str(len(ones)), str(sum(one.within(deadline) for one in ones)), f"{answered / seconds:.2f}", *times, *gaps]


def _ratio(streamed: Mapping[str, Mapping[str, Sequence[Streamed]]], load: str, args: argparse.Namespace) -> str:
    within = {
        server: sum(one.within(args.deadline) for one in loads[load])
        for server, loads in streamed.items()
        if load in loads
    }
    best = max((number for server, number in within.items() if server != APB), default=0)
    return shown_ratio(within[APB] / best) if best and APB in within else NO_FIGURE


def draw(streamed: Mapping[str, Mapping[str, Sequence[Streamed]]], deadline: float, path: Path, title: str) -> None:
    """Needs matplotlib. For each load and kind of prompt: which share had its first token after how long."""
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(load for of_server in streamed.values() for load in of_server))
    panels = [(load, kind) for load in loads for kind in (SHORT, LONG) if (load, kind) != (BESIDE, LONG)]
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axes, (load, kind) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for server, color in zip(streamed, cycle(["C0", "C1", "C2", "C3", "C4", "C5"]), strict=False):
            ones = [one for one in streamed[server].get(load, []) if one.kind == kind]
            times = sorted(one.first for one in ones if one.first is not None)
            shares = [100 * number / len(ones) for number in range(1, len(times) + 1)]
            axes.step(times, shares, where="post", label=server, color=color)
        axes.axvline(deadline, color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(f"{load}: {kind} prompts")
        axes.set_xscale("log")
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supxlabel("time to first token, s")
    figure.supylabel("prompts, %")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _as_json(streamed: Mapping[str, Mapping[str, Sequence[Streamed]]]) -> list[dict[str, Any]]:
    """A record a request; of the times between its tokens the mean and the longest."""
    records = []
    for server, loads in streamed.items():
        for load, ones in loads.items():
            for one in ones:
                record = {"server": server, "load": load} | asdict(one)
                gaps = record.pop("between")
                mean = round(sum(gaps) / len(gaps), 4) if gaps else None
                records.append(record | {"mean_between": mean, "longest_between": max(gaps, default=None)})
    return records


def _prompt(seed: int, vocab_size: int, length: int, number: int) -> list[int]:
    return random_prompt(seed, length, number, vocab_size)
