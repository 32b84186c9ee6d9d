"""`sglang-apb`: the command line. One module of `sglang_apb.commands` a command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from sglang_apb import __version__
from sglang_apb.commands import CommandError, add_modules, launch

COMMANDS = {
    "model": "sglang_apb.commands.model",
    "launch": "sglang_apb.commands.launch",
    "demo": "sglang_apb.commands.demo",
    "eval": "sglang_apb.commands.eval",
    "bench": "sglang_apb.commands.bench",
    "cluster": "sglang_apb.commands.cluster",
    "keys": "sglang_apb.commands.keys",
    "doctor": "sglang_apb.commands.doctor",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `args.run` is the chosen command's function."""
    parser = argparse.ArgumentParser(prog="sglang-apb", description="Tools around APB prefill for SGLang.")
    parser.add_argument("--version", action="version", version=f"sglang-apb {__version__}")
    add_modules(parser, "command", COMMANDS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0, 1 for a CommandError, 2 for a bad command line."""
    _end_orderly()
    args = _parse(_with_values_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        return args.run(args)
    except CommandError as error:
        print(f"sglang-apb {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What follows -- is for servers; argparse would lose it behind options where there is another positional."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = build_parser()
    args = parser.parse_args(arguments[:end])
    if stray := getattr(args, "server_args", None):
        parser.error(f"unrecognized arguments: {' '.join(stray)}; what is for servers follows --")
    if rest := arguments[end + 1 :]:
        if not hasattr(args, "server_args"):
            parser.error(f"unrecognized arguments: {' '.join(arguments[end:])}")
        args.server_args = list(rest)
    return args


def _end_orderly() -> None:
    """Lets `with` blocks end what they started when the process is told to end, unless nohup said otherwise."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _with_values_joined(arguments: Sequence[str]) -> list[str]:
    """`--prefill-args --flag` as `--prefill-args=--flag`: argparse would take the value for an option of ours."""
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*joined, argument, *rest]
        value = next(rest, None) if argument in launch.VERBATIM_OPTIONS else None
        joined.append(argument if value is None else f"{argument}={value}")
    return joined


if __name__ == "__main__":
    sys.exit(main())
