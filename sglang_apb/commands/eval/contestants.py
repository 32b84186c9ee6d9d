"""Who is compared: servers with a name each, that run already or are started here, several at once on several GPUs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglang_apb import config
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.arguments import count
from sglang_apb.commands.eval.asking import request
from sglang_apb.commands.eval.templates import config_of
from sglang_apb.commands.servers import LocalServer, num_gpus, value_of
from sglang_apb.config import ConfigError

# The contestant that the others are compared with.
EXACT = "exact"
# APB's defaults, for prompts of any length.
DEFAULT = ("apb", '{"min_tokens": 0}')
_PORTS = 2  # of a server: its own, its ranks'
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Contestant:
    """A running server at `url`, or else one to start: with a prefill backend's `config`, or plain SGLang."""

    name: str
    url: str | None = None
    config: str | None = None

    def made_with(self, args: argparse.Namespace) -> dict[str, Any]:
        """What its answers depend on. Raises CommandError when a server does not say."""
        twice = {"twice": True} if args.twice else {}
        if self.url is not None:
            return {"url": self.url, "model": request("GET", f"{self.url}/model_info").get("model_path")} | twice
        versions = {name: version(name) for name in ("sglang", "sglang-apb")}
        path = Path(args.model)
        model = {"model": str(path.resolve()) if path.exists() else args.model, "server_args": args.server_args}
        ours = {} if self.config is None else {"config": self.config, "sp_size": args.sp_size}
        return model | ours | versions | twice


def add_server_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What every kind of evaluation, here `name`, is told alike: whom to ask, and where answers are kept."""
    parser.add_argument("--model", help="model folder or hub name; its tokenizer measures the prompts")
    parser.add_argument(
        "--config",
        type=_named,
        action="append",
        metavar="NAME=JSON",
        help="a server to start, with this --prefill-backend-config; several times for several servers. "
        f"{'='.join(DEFAULT)} if left out. Plain SGLang, {EXACT!r}, is asked too",
    )
    parser.add_argument(
        "--url",
        type=_named,
        action="append",
        metavar="NAME=URL",
        help=f"a running server to ask, instead; several times for several servers, {EXACT!r} being the one that the "
        "others are compared with",
    )
    parser.add_argument("--sp-size", type=count, default=1, help="ranks of each APB server started here")
    parser.add_argument(
        "--servers-per-gpu",
        type=count,
        default=1,
        help="servers started here that share a GPU, for small models; say after -- what each may hold "
        "(--max-total-tokens). Their times say little then",
    )
    parser.add_argument(
        "--twice",
        action="store_true",
        help="every prompt twice in a row; the second answer counts, for which the prompt is found in the prefix cache "
        "(else it is off)",
    )
    parser.add_argument("--port", type=count, default=30100, help="of the first server started here; each takes two")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("eval") / name,
        metavar="FOLDER",
        help="for answers and what is made of them; a run that finds answers there goes on",
    )
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for all servers started here")


def contestants_of(args: argparse.Namespace) -> list[Contestant]:
    """Raises CommandError."""
    if args.url:
        if args.config or args.server_args:
            raise CommandError("--url asks servers that run; --config and what follows -- are for servers started here")
        contestants = [Contestant(name, url=url.rstrip("/")) for name, url in args.url]
    elif value_of("--api-key", args.server_args):
        raise CommandError("--api-key: servers started here are asked from this machine alone; leave it out")
    elif args.model is None:
        raise CommandError("say which model with --model DIR, or which servers with --url NAME=URL")
    else:
        chosen = args.config or [DEFAULT]
        contestants = [Contestant(EXACT), *(Contestant(name, config=text) for name, text in chosen)]
    names = [contestant.name for contestant in contestants]
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"{name!r} is the name of two contestants: give each a name of its own")
    for contestant in contestants:
        try:
            config.parse(contestant.config)
        except ConfigError as error:
            raise CommandError(f"--config {contestant.name}: {error}") from error
    return contestants


def running(
    contestants: Sequence[Contestant], args: argparse.Namespace, log_dir: Path
) -> Generator[list[tuple[Contestant, str]]]:
    """Contestants with their URLs, as many as run at once; those that are started here end when the next are asked for.

    Raises CommandError.
    """
    if args.url and contestants:
        yield [(contestant, contestant.url or "") for contestant in contestants]
    if args.url:
        return
    gpus_each = max(args.sp_size, _gpus_of(args.server_args))
    at_once = max(num_gpus() // gpus_each, 1) * args.servers_per_gpu
    for first in range(0, len(contestants), at_once):
        with ExitStack() as stack:
            servers = []
            for place, contestant in enumerate(contestants[first : first + at_once]):
                gpu = place // args.servers_per_gpu * gpus_each
                servers.append((contestant, _server(contestant, args, log_dir, gpu, first + place)))
            for contestant, server in servers:
                log = log_dir / contestant.name
                print(f"starting the {contestant.name} server, log in {log}", flush=True)
                stack.enter_context(server)
            for _, server in servers:
                server.wait_ready()
            yield [(contestant, server.url) for contestant, server in servers]


def _gpus_of(server_args: Sequence[str]) -> int:
    """Of a server that is started with these."""
    names = (("--tp-size", "--tensor-parallel-size", "--tp"), ("--pp-size", "--pipeline-parallel-size", "--pp"))
    sizes = (next(filter(None, (value_of(name, server_args) for name in given)), "1") for given in names)
    return math.prod(int(size) if size.isdigit() else 1 for size in sizes)


def _server(contestant: Contestant, args: argparse.Namespace, log_dir: Path, gpu: int, number: int) -> LocalServer:
    """From GPU `gpu` on, and on ports of its own: those of a server that has just ended may still be closing.

    Without SGLang's prefix cache unless it is to be tried: prompts of a task begin alike, and times would be those of
    their ends.
    """
    arguments = ["--enable-cache-report" if args.twice else "--disable-radix-cache", *args.server_args]
    if contestant.config is not None:
        arguments += ["--prefill-backend", "apb", "--sp-size", str(args.sp_size)]
        arguments += ["--prefill-backend-config", contestant.config]
    if num_gpus() and value_of("--base-gpu-id", args.server_args) is None:
        arguments += ["--base-gpu-id", str(gpu)]
    port = args.port + _PORTS * number
    return LocalServer(args.model, port=port, log_dir=log_dir / contestant.name, arguments=arguments)


def check_config_length(args: argparse.Namespace, longest: int) -> None:
    """Before prompts are made, as far as the model's configuration can tell. Raises CommandError."""
    changing = ("--context-length", "--json-model-override-args")
    if args.url or any(argument.startswith(changing) for argument in args.server_args):
        return
    limit = getattr(config_of(args.model), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise CommandError(
            f"--lengths {longest}: the model takes {limit} tokens; give shorter ones, or after -- what makes it take "
            "more, such as --json-model-override-args for YaRN"
        )


def check_length(url: str, longest: int) -> None:
    """Raises CommandError when the server's model takes no prompts of `longest` tokens, answers included."""
    limit = (request("GET", f"{url}/v1/models").get("data") or [{}])[0].get("max_model_len")
    if limit is not None and longest > limit:
        raise CommandError(f"a prompt of {longest} tokens, its answer included, is longer than {url} takes: {limit}")


def model_of(args: argparse.Namespace, contestants: Sequence[Contestant]) -> str:
    """Where the tokenizer is."""
    model = args.model or request("GET", f"{contestants[0].url}/model_info").get("tokenizer_path")
    if not model:
        raise CommandError(f"{contestants[0].url} does not say where its tokenizer is: give --model")
    return str(model)


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, with a name of letters, digits, '.', '_', '-'")
    return name, value
