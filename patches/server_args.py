"""Targets: `ServerArgs.add_cli_args`, `from_cli_args`, `__init__`. Reason: our options on SGLang's command line.

SGLang builds its options from the fields of a dataclass, to which nothing can be added. Ours are plain
attributes of the instance: they travel to the rank processes in its pickle.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextvars import ContextVar
from typing import Any

from sglang_apb.patches._patch import Patch, PatchError

from sglang_apb import options as options_module
from sglang_apb.options import PluginOptions
from sglang_apb.settings import ConfigError

_NAMES = {
    "prefill_backend": "backend",
    "sp_size": "sp_size",
    "prefill_backend_config": "config_text",
    "kv_transfer_config": "transfer_text",
}
_from_command_line: ContextVar[dict[str, Any] | None] = ContextVar("_from_command_line", default=None)


def options_of(server_args: Any) -> PluginOptions:
    """The options that a ServerArgs was built with."""
    return getattr(server_args, "plugin_options", PluginOptions())


def _add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    options_module.add_to_parser(parser)


def _from_cli_args(original: Any, cls: type, args: argparse.Namespace) -> Any:
    """SGLang keeps only the namespace's values that are fields: ours reach `__init__` beside them."""
    token = _from_command_line.set({name: getattr(args, name) for name in _NAMES if hasattr(args, name)})
    try:
        return original(cls, args)
    except (options_module.OptionError, ConfigError, PatchError) as error:
        print(f"sglang: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        _from_command_line.reset(token)


def _init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    given = (_from_command_line.get() or {}) | {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
    options = PluginOptions(**{_NAMES[name]: value for name, value in given.items()})
    options.check()
    is_mem_fraction_given = kwargs.get("mem_fraction_static") is not None
    if options.sp_size > 1:
        kwargs = _with_sequence_parallel_ranks(kwargs, options.sp_size)
    original(self, *args, **kwargs)
    object.__setattr__(self, "plugin_options", options)
    object.__setattr__(self, "is_mem_fraction_given", is_mem_fraction_given)  # SGLang fills in its default
    if options.is_set:
        options_module.check_server_args(self, options)
    options_module.check_transfer(self, options)
    from sglang_apb import plugin

    plugin.install(self)


def _with_sequence_parallel_ranks(kwargs: dict[str, Any], sp_size: int) -> dict[str, Any]:
    """SGLang's context-parallel ranks without its strategies: one KV pool a rank, with every head."""
    for name in ("tp_size", "attn_cp_size"):
        if kwargs.get(name) not in (None, 1, sp_size):
            raise options_module.OptionError(
                f"--sp-size {sp_size} does not go with --{name.replace('_', '-')} {kwargs[name]}: leave one of them out"
            )
    # Ranks that drew different tokens would wait for each other for ever: SGLang can compare them at each step.
    os.environ["SYNC_TOKEN_IDS_ACROSS_TP"] = "1"
    return kwargs | {"tp_size": sp_size, "attn_cp_size": sp_size}


PATCHES = (
    Patch("sglang.srt.server_args.ServerArgs.__init__", "around", None, _init),
    Patch("sglang.srt.server_args.ServerArgs.add_cli_args", "after", ("parser",), _add_cli_args),
    Patch("sglang.srt.server_args.ServerArgs.from_cli_args", "around", ("cls", "args"), _from_cli_args),
)
