"""`sglang-apb bench reuse`: what is found again, by plain SGLang and by APB, on the same GPUs, one after the other.

    document   questions about one document, one after the other: all but their last tokens are the same
    chat       turns of a chat, each the beginning of the next

Prompts are random token ids, answers one token; the time is from request to answer. What follows -- goes to all
servers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import requests
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import compared
from sglang_apb.commands.bench.arguments import count, counts
from sglang_apb.commands.bench.servers import BenchServer
from sglang_apb.commands.bench.table import NO_FIGURE, best_over_apb, markdown, shown_ratio, shown_seconds
from sglang_apb.commands.bench.timed_prompts import ask, random_prompt

HELP = "a document asked again and a chat that grows: what the prefix cache saves, APB against plain SGLang"
DOCUMENT, CHAT = "document", "chat"
_SETTINGS = ("document", "questions", "question_tokens", "chat", "turns")
# Of random prompts that nothing else is made of.
_WARM_UP, _CHAT = 1 << 21, 1 << 22


@dataclass(frozen=True)
class Asked:
    """One request's time; `cached_tokens` of its `num_tokens` were found. `reason`: why there is no time."""

    server: str
    series: str
    number: int
    num_tokens: int
    seconds: float | None = None
    cached_tokens: int = 0
    reason: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compared.add_arguments(parser)
    parser.add_argument("--document", type=count, default=131072, help="tokens of the document with its question")
    parser.add_argument("--questions", type=count, default=10, help="about the document")
    parser.add_argument("--question-tokens", type=count, default=128, help="of each, that no other has")
    parser.add_argument("--chat", type=counts, default=[16384, 65536], help="tokens of its first and last turn")
    parser.add_argument("--turns", type=count, default=10, help="of the chat")


def run(args: argparse.Namespace) -> int:
    if args.question_tokens >= args.document:
        raise CommandError(f"--question-tokens {args.question_tokens} leaves nothing of --document {args.document}")
    if len(args.chat) != 2:
        raise CommandError(f"--chat takes the tokens of the first and of the last turn, not {args.chat}")
    model_config, _ = compared.complete(args)
    vocab_size = compared.vocab_size(model_config)
    series = series_of(args, vocab_size)
    warm_up = random_prompt(args.seed, args.document, _WARM_UP, vocab_size)
    asked: list[Asked] = []
    with compared.model_of(args) as model:
        plans = compared.plans_of(args)
        for name, server in compared.servers_of(args, plans, model):
            asked += _ask_server(name, server, series, warm_up)
            if args.output:
                compared.write(args, plans, _SETTINGS, results=[asdict(each) for each in asked])
    print(describe(asked))
    compared.finish(args, partial(draw, asked), has_figures=any(each.seconds is not None for each in asked))
    return 0


def series_of(args: argparse.Namespace, vocab_size: int) -> dict[str, list[list[int]]]:
    """The prompts of each series, in the order in which they are asked."""
    document = random_prompt(args.seed, args.document - args.question_tokens, 0, vocab_size)
    questions = (random_prompt(args.seed, args.question_tokens, index, vocab_size) for index in range(args.questions))
    first, last = args.chat
    chat = random_prompt(args.seed, last, _CHAT, vocab_size)
    steps = max(args.turns - 1, 1)
    return {
        DOCUMENT: [document + question for question in questions],
        CHAT: [chat[: first + (last - first) * turn // steps] for turn in range(args.turns)],
    }


def _ask_server(
    name: str, server: BenchServer, series: Mapping[str, Sequence[list[int]]], warm_up: list[int]
) -> list[Asked]:
    """Starts it, asks everything, and ends it. What has no time has the reason in it."""
    asked: list[Asked] = []
    prompts = [(of, number, prompt) for of, prompts in series.items() for number, prompt in enumerate(prompts, 1)]
    try:
        with server, tqdm(total=len(prompts), desc=name, unit="prompt") as progress:
            server.wait_ready()
            try:
                ask(server.url, warm_up, {})
                for of, number, prompt in prompts:
                    answer = ask(server.url, prompt, {})
                    found = answer.content.get("meta_info", {}).get("cached_tokens", 0)
                    seconds = answer.seconds if answer.reason is None else None
                    asked.append(Asked(name, of, number, len(prompt), seconds, found, answer.reason))
                    progress.update()
            except requests.RequestException as error:
                server.raise_why(error)
    except CommandError as error:  # of this server only: the others are still worth their time
        missing = prompts[len(asked) :]
        asked += [Asked(name, of, number, len(prompt), reason=str(error)) for of, number, prompt in missing]
    return asked


def describe(asked: Sequence[Asked]) -> str:
    """A table for each series: a row a request, with each server's time and what it found, and one of all together."""
    servers = list(dict.fromkeys(each.server for each in asked))
    parts = []
    for series in dict.fromkeys(each.series for each in asked):
        rows = []
        of_series = [each for each in asked if each.series == series]
        for number in dict.fromkeys(each.number for each in of_series):
            row = {each.server: each for each in of_series if each.number == number}
            times = {name: each.seconds for name, each in row.items()}
            length = next(iter(row.values())).num_tokens
            rows.append([str(number), f"{length:,}", *_cells(row, servers), shown_ratio(best_over_apb(times))])
        totals = {name: _total([each.seconds for each in of_series if each.server == name]) for name in servers}
        both = [part for name in servers for part in (shown_seconds(totals[name]), NO_FIGURE)]
        rows.append(["all", NO_FIGURE, *both, shown_ratio(best_over_apb(totals))])
        columns = [column for name in servers for column in (name, "found")]
        parts.append(markdown([series, "tokens", *columns, "best plain / apb"], rows))
    reasons = dict.fromkeys(f"- {each.server}: {each.reason}" for each in asked if each.reason is not None)
    return "\n\n".join(["", *parts, *reasons])


def draw(asked: Sequence[Asked], path: Path, title: str) -> None:
    """Needs matplotlib. A line a server over the requests of each series."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(each.series for each in asked))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, series in zip(figure.subplots(1, len(names)), names, strict=True):
        for server in dict.fromkeys(each.server for each in asked):
            times = [each for each in asked if (each.server, each.series) == (server, series)]
            axes.plot([each.number for each in times], [each.seconds for each in times], marker="o", label=server)
        axes.set_title(series)
        axes.set_xlabel("request")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supylabel("time to first token, s")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _cells(row: Mapping[str, Asked], servers: Sequence[str]) -> list[str]:
    pairs = ((shown_seconds(row[name].seconds), f"{row[name].cached_tokens:,}") for name in servers)
    return [cell for pair in pairs for cell in pair]


def _total(times: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    there = [seconds for seconds in times if seconds is not None]
    return sum(there) if there and len(there) == len(times) else None
