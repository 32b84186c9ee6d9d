"""What SGLang finds when sglang-apb is installed. It calls `register` in every process, before it reads options.

That adds our options and two steps to their resolution; nothing else of SGLang is touched. On another SGLang than the
known one it does nothing and says so. What options ask for is applied later: `installing.py`.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of group `sglang.srt.plugins`. Without it SGLang is as if we were not installed: it goes on, and
    refuses our options.
    """
    from sglang_apb.patches import _patch

    try:
        _patch.check_version()
    except _patch.PatchError as error:
        logger.error("%s", error)
        return
    from sglang_apb.patches import scheduler_process, server_args, transfer_backend

    transfer_backend.register_choice()
    server_args.register_steps()
    _patch.apply((*server_args.PATCHES, *scheduler_process.PATCHES))
