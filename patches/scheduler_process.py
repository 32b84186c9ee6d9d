"""Target: `configure_scheduler_process`. Reason: the first call in a rank process that knows the server's
arguments, and so the place to apply the other patches there (the parent does it while they are resolved). Official
point tried: plugins are loaded in a rank process before it has the arguments.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches._patch import Patch

from sglang_apb import installing


def _install(server_args: Any, *_: Any, **__: Any) -> None:
    installing.install(server_args)


PATCHES = (Patch("sglang.srt.managers.scheduler.configure_scheduler_process", "before", None, _install),)
