"""Targets: `Engine._launch_scheduler_processes`, `TokenizerManager.auto_create_handle_loop`,
`SignalHandler.running_phase_sigquit_handler`.

Reason: ranks over several hosts. When a host is gone, the others' ranks wait for it in a collective, and their clients
with them, or SGLang closes connections without a word. Here the first host answers its clients with the cause, and then
each host ends, so that whoever started them can start them anew; also when a rank of its own was killed, which SGLang
sees on the first host alone. Official point tried: `--custom-sigquit-handler` is not asked any more once the server
answers requests.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from multiprocessing.connection import wait
from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import SGLANG_VERSION, Patch

from sglang_apb import __version__, config
from sglang_apb.host_group import FirstHost, HostWatch

logger = logging.getLogger(__name__)

# Once a rank of this host has failed: as long as the watch may take to tell that another host is why.
_VERDICT_S = 3.0
# For answers to leave.
_GRACE_S = 1.0
# On other hosts, whose ranks the first one may have told to end.
_FOLLOWERS_GRACE_S = 4.0
# At most: SGLang's event loop may be reading a long prompt.
_ANSWER_S = 5.0
# SGLang gives its schedulers 15 s to end when it was told to.
_DRAIN_S = 30.0


class _Ending:
    """Of this host, once: whoever comes first says why."""

    def __init__(self) -> None:
        self.manager: Any = None  # SGLang's TokenizerManager, once requests are answered
        self._reason_is_there = threading.Event()
        self._reason = ""
        self._begun = threading.Lock()

    def host_is_gone(self, reason: str) -> None:
        self._reason = reason
        self._reason_is_there.set()
        self._end(reason)

    def rank_failed(self) -> None:
        threading.Thread(target=self._end_for_a_rank, daemon=True).start()

    def _end_for_a_rank(self) -> None:
        self._reason_is_there.wait(_VERDICT_S)
        self._end(self._reason or "A rank of the first host has failed; its log says why.")

    def _end(self, reason: str) -> None:
        manager = self.manager
        if manager is not None and manager.gracefully_exit:
            time.sleep(_DRAIN_S)  # the others end first then; what goes on after that waits for them
        if not self._begun.acquire(blocking=False):
            return
        logger.error("%s This host's ranks end, too.", reason)
        try:
            if manager is not None:
                _answer_clients(manager, reason)
            time.sleep(_GRACE_S if manager is not None else _FOLLOWERS_GRACE_S)
        finally:
            _end_server()


_ending = _Ending()


def _answer_clients(manager: Any, reason: str) -> None:
    """With HTTP 503 and the reason, in SGLang's event loop; returns when they have it."""
    done = threading.Event()

    def answer() -> None:
        try:
            _abort_all(manager, reason)
        finally:
            done.set()

    manager.event_loop.call_soon_threadsafe(answer)
    done.wait(_ANSWER_S)


def _abort_all(manager: Any, reason: str) -> None:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    manager.server_status = ServerStatus.UnHealthy
    why = {
        "type": "abort",
        "message": f"The group of prefill ranks ends: {reason}",
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
        "err_type": "ServiceUnavailable",
    }
    for rid in list(manager.rid_to_state):
        try:
            manager._handle_abort_req(AbortReq(rid=rid, finished_reason=why))
        except Exception:
            logger.exception("request %s could not be told why it ends", rid)


def _end_server() -> None:
    from sglang.srt.utils import kill_process_tree

    try:
        kill_process_tree(os.getpid(), include_parent=False, wait_timeout=None)
    finally:
        os._exit(1)


def _watch_hosts_and_ranks(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    _watch_hosts(server_args)
    result, ranks = original(cls, server_args, *args, **kwargs)
    result.block_until_scheduler_exits = partial(_wait, ranks)  # only called on hosts other than the first
    return result, ranks


def _wait(ranks: Sequence[Any]) -> None:
    """Returns when all have ended. The first that has failed ends this host; SGLang waits for them in order, and ends
    with status 0.
    """
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in wait(list(running)):
            rank = running.pop(sentinel)
            rank.join()  # what the sentinel tells is a moment before there is a status
            if rank.exitcode:
                logger.error("Rank process %d has ended with %d. This host's ranks end, too.", rank.pid, rank.exitcode)
                sys.exit(1)


def _watch_hosts(server_args: Any) -> None:
    view, options = insides.resolved(server_args), insides.options_of(server_args)
    settings = {
        "sglang": SGLANG_VERSION,
        "sglang-apb": __version__,
        "--nnodes": str(view.nnodes),
        "--prefill-backend": f"{options.backend} {config.parse(options.config_text)}",
        "--sp-size": str(options.sp_size),
        "--disaggregation-mode": str(view.disaggregation_mode),
        "--page-size": str(view.page_size),
    }
    first = FirstHost.parse(view.dist_init_addr)
    HostWatch(first, view.nnodes, view.node_rank, settings, _ending.host_is_gone).start()


def _remember(result: None, self: Any) -> None:
    _ending.manager = self


def _end_with_a_reason(original: Any, self: Any, signum: Any = None, frame: Any = None) -> None:
    if self.tokenizer_manager._subprocess_watchdog is not None:
        self.tokenizer_manager._subprocess_watchdog.stop()
    _ending.rank_failed()


PATCHES = (
    Patch("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", "around", None, _watch_hosts_and_ranks),
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop", "after", ("self",), _remember
    ),
    Patch(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.running_phase_sigquit_handler",
        "around",
        ("self", "signum", "frame"),
        _end_with_a_reason,
    ),
)
