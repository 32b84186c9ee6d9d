"""The commands of `sglang-apb`, one module each, with `add_arguments(parser)` and `run(args) -> exit status`."""

from __future__ import annotations


class CommandError(Exception):
    """A command could not do what it was asked; its text is one sentence for the user."""
