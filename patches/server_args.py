"""Our options on SGLang's command line.

Official point: `register_resolution_hook`, by which SGLang's resolution of its arguments takes in our ranks (its first
step) and our checks (one of its last).
Targets: `ServerArgs.add_cli_args`, `from_cli_args`. Reason: SGLang builds its options from the fields of a struct, to
which nothing can be added. Ours are an attribute beside them: it travels to the rank processes in the struct's pickle.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch, PatchError

from sglang_apb import host_group, installing
from sglang_apb import options as options_module
from sglang_apb.options import PluginOptions
from sglang_apb.settings import ConfigError

logger = logging.getLogger(__name__)

_NAMES = {
    "prefill_backend": "backend",
    "sp_size": "sp_size",
    "prefill_backend_config": "config_text",
    "kv_transfer_config": "transfer_text",
}
Step = Callable[[Any], None]


def register_steps() -> None:
    """Hooks two steps of SGLang's argument resolution. Called once a process, by `plugin.register`."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_deprecated_dp_attention")(_take_ranks)
    register_resolution_hook("handle_other_validations")(_check_and_install)


def _take_ranks(server_args: Any, previous: Step) -> None:
    """SGLang's context-parallel ranks without its strategies: one KV pool a rank, with every head."""
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.environ import envs

    options = insides.options_of(server_args)
    sp_size = options.sp_size
    with _ending_in_one_line():
        options_module.check_front(server_args, options, is_rust=envs.SGLANG_RUST_SERVER.get())
    if options.is_set and insides.may_have_our_cache(server_args):
        declare_resolution(server_args, "sglang-apb", radix_cache_backend=options_module.CONTEXT_CACHE)
    if sp_size > 1:
        with _ending_in_one_line():
            options_module.check_parallel_sizes(server_args, sp_size)
        declare_resolution(server_args, "sglang-apb", tp_size=sp_size, attn_cp_size=sp_size)
        _take_hosts(server_args, sp_size)
        # Ranks that drew different tokens would wait for each other for ever: SGLang can compare them at each step.
        os.environ["SYNC_TOKEN_IDS_ACROSS_TP"] = "1"
    previous(server_args)


def _take_hosts(server_args: Any, sp_size: int) -> None:
    """Ranks over several hosts speak by the network that leads to the first of them."""
    with _ending_in_one_line():
        first = options_module.check_hosts(server_args, sp_size)
        if first is not None and (chosen := host_group.use_route(host_group.route_to(first), os.environ)):
            logger.info("hosts speak with each other by %s", ", ".join(chosen))


def _check_and_install(server_args: Any, previous: Step) -> None:
    previous(server_args)
    view, options = insides.resolved(server_args), insides.options_of(server_args)
    with _ending_in_one_line():
        if options.is_set:
            options_module.check_server_args(view, insides.model_config_of(server_args), options)
        if options_module.uses_transfer(view):
            options_module.check_transferable(view, insides.model_config_of(server_args), options.transfer())
        options_module.check_transfer(view, options)
        installing.install(server_args)


def _add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    options_module.add_to_parser(parser)


def _from_cli_args(original: Any, cls: type, args: argparse.Namespace) -> Any:
    """SGLang keeps only the namespace's values that are fields: ours are set beside them."""
    options = PluginOptions(**{ours: getattr(args, name) for name, ours in _NAMES.items() if hasattr(args, name)})
    with _ending_in_one_line():
        options.check()
    record = original(cls, args)
    record.plugin_options = options
    return record


@contextmanager
def _ending_in_one_line() -> Iterator[None]:
    try:
        yield
    except (options_module.OptionError, host_group.HostGroupError, ConfigError, PatchError) as error:
        print(f"sglang: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


PATCHES = (
    Patch("sglang.srt.server_args.ServerArgs.add_cli_args", "after", ("parser",), _add_cli_args),
    Patch("sglang.srt.server_args.ServerArgs.from_cli_args", "around", ("cls", "args"), _from_cli_args),
)
