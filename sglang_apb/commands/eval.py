"""`sglang-apb eval needles`: how often a hidden fact is found, with APB and with exact attention."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.needles import NeedlePrompt, build_prompts
from sglang_apb.commands.report import prefill_report, write_result
from sglang_apb.commands.servers import LocalServer

HELP = "count needles found in long prompts, against exact attention"
_ANSWER_TOKENS = 16
_REQUEST_TIMEOUT_S = 1800.0
# What a result depends on; ports and folders are not among it.
_SETTINGS = ("lengths", "num_prompts", "seed", "sp_size", "prefill_backend_config", "server_args")


@dataclass(frozen=True)
class Outcome:
    """One prompt's outcome on one server. `seconds` is the whole request's time."""

    server: str
    length: int
    num_tokens: int
    depth: float
    city: str
    number: str
    completion: str
    found: bool
    seconds: float
    prefill: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    needles = kinds.add_parser("needles", help=HELP, description=__doc__)
    needles.add_argument("--model", help="model folder or hub name; its tokenizer measures the prompts")
    needles.add_argument("--url", help="a running server to ask; without it, both servers are started in turn")
    needles.add_argument("--baseline-url", help="a running server with exact attention, asked the same")
    needles.add_argument("--lengths", type=_lengths, default=[4096, 7168], help="prompt tokens, comma-separated")
    needles.add_argument("--num-prompts", type=int, default=10, help="prompts a length")
    needles.add_argument("--seed", type=int, default=0)
    needles.add_argument("--output", type=Path, help="JSON file for the result")
    needles.add_argument("--port", type=int, default=30100, help="of the servers started here; the next 3 are used too")
    needles.add_argument("--log-dir", type=Path, help="of the servers started here; a temporary folder if left out")
    needles.add_argument("--sp-size", type=int, default=1, help="ranks of the APB server started here")
    needles.add_argument(
        "--prefill-backend-config",
        default='{"min_tokens": 0}',
        help="of the APB server started here; the defaults, for prompts of any length, if left out",
    )
    needles.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for both servers started here")


def run(args: argparse.Namespace) -> int:
    if args.model is None and args.url is None:
        raise CommandError("say which model with --model DIR, or which server with --url URL")
    if args.num_prompts < 1:
        raise CommandError(f"--num-prompts must be at least 1, not {args.num_prompts}")
    prompts = _prompts(args)
    with closing(_servers(args)) as servers:
        outcomes = [outcome for name, url in servers for outcome in ask_all(name, url, prompts)]
    print(table(outcomes))
    if args.output:
        _write(args, outcomes)
        print(f"written to {args.output}")
    return 0


def ask_all(server: str, url: str, prompts: Sequence[tuple[int, NeedlePrompt]]) -> list[Outcome]:
    """Asks every (length, prompt) one after the other, with a progress bar. Raises CommandError."""
    return [_ask(server, url, length, prompt) for length, prompt in tqdm(prompts, desc=server, unit="prompt")]


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per length, a column per server: needles found of needles asked for."""
    servers = list(dict.fromkeys(outcome.server for outcome in outcomes))
    lines = [f"{'tokens':>8}" + "".join(f"{server:>12}" for server in servers)]
    for length in dict.fromkeys(outcome.length for outcome in outcomes):
        cells = [_score(outcomes, server, length) for server in servers]
        lines.append(f"{length:>8}" + "".join(f"{found:>6} of {asked:<2}" for found, asked in cells))
    return "\n".join(lines)


def _prompts(args: argparse.Namespace) -> list[tuple[int, NeedlePrompt]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model or _model_of(args.url))

    def count_tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    try:
        return [
            (length, prompt)
            for length in tqdm(args.lengths, desc="prompts", unit="length")
            for prompt in build_prompts(length, args.num_prompts, args.seed, count_tokens)
        ]
    except ValueError as error:
        raise CommandError(str(error)) from error


def _servers(args: argparse.Namespace) -> Generator[tuple[str, str]]:
    """Name and URL of each server; one that is started here runs until the next one is asked for."""
    if args.url:
        if args.baseline_url:
            yield "exact", args.baseline_url
        yield "apb", args.url
        return
    method = ["--prefill-backend", "apb", "--sp-size", str(args.sp_size)]
    method += ["--prefill-backend-config", args.prefill_backend_config]
    with _log_dir(args.log_dir) as log_dir:
        # Ports of their own: those of a server that has just ended may still be closing.
        for port, name, arguments in ((args.port, "exact", []), (args.port + 2, "apb", method)):
            print(f"starting the {name} server, log in {log_dir / name}")
            arguments = [*arguments, *args.server_args]
            server = LocalServer(args.model, port=port, log_dir=log_dir / name, arguments=arguments)
            with server:
                server.wait_ready()
                yield name, server.url


@contextmanager
def _log_dir(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="sglang-apb-eval-") as temporary:
        yield Path(temporary)


def _ask(server: str, url: str, length: int, prompt: NeedlePrompt) -> Outcome:
    body = {"model": "default", "prompt": prompt.text, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    started = time.perf_counter()
    response = _request("POST", f"{url}/v1/completions", json=body)
    completion = response["choices"][0]["text"]
    return Outcome(
        server=server,
        length=length,
        num_tokens=prompt.num_tokens,
        depth=prompt.depth,
        city=prompt.city,
        number=prompt.number,
        completion=completion,
        found=prompt.is_answered(completion),
        seconds=round(time.perf_counter() - started, 3),
        prefill=prefill_report(response),
    )


def _request(method: str, url: str, **kwargs: Any) -> dict[str, Any]:
    try:
        response = requests.request(method, url, timeout=_REQUEST_TIMEOUT_S, **kwargs)
    except requests.RequestException as error:
        raise CommandError(f"{url} does not answer: {error}") from error
    if not response.ok:
        raise CommandError(f"{url} answered {response.status_code}: {response.text[:500]}")
    return response.json()


def _model_of(url: str) -> str:
    return _request("GET", f"{url}/model_info")["tokenizer_path"]


def _score(outcomes: Sequence[Outcome], server: str, length: int) -> tuple[int, int]:
    found = [outcome.found for outcome in outcomes if (outcome.server, outcome.length) == (server, length)]
    return sum(found), len(found)


def _write(args: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    scores = [
        {"server": server, "length": length, "found": found, "asked": asked}
        for server, length in dict.fromkeys((outcome.server, outcome.length) for outcome in outcomes)
        for found, asked in [_score(outcomes, server, length)]
    ]
    write_result(
        args.output,
        model=args.model,
        settings={name: getattr(args, name) for name in _SETTINGS},
        scores=scores,
        outcomes=[asdict(outcome) for outcome in outcomes],
    )


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
