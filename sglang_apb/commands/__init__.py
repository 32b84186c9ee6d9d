"""The commands of `sglang-apb`, a module each: `add_arguments(parser)` and `run(args) -> exit status`."""

from __future__ import annotations


class CommandError(Exception):
    """A command could not do what it was asked; its text is one sentence for the user."""
