"""The commands of `sglang-apb`, a module each: `add_arguments(parser)` and `run(args) -> exit status`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module


class CommandError(Exception):
    """A command could not do what it was asked; its text is one sentence for the user."""


def add_modules(parser: argparse.ArgumentParser, dest: str, modules: Mapping[str, str]) -> None:
    """A subcommand for each module, by its name: HELP, its docstring, `add_arguments(parser)`, and `run(args)`, which
    `args.run` is when it was chosen. A module of further subcommands has no `run`: theirs is chosen.
    """
    commands = parser.add_subparsers(dest=dest, required=True, metavar=dest.upper())
    for name, module_name in modules.items():
        module = import_module(module_name)
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        if hasattr(module, "run"):
            command.set_defaults(run=module.run)
