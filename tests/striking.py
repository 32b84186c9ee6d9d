"""What happens to a process of a cluster: it is stopped, killed, or cut off from a decode server that is far away."""

from __future__ import annotations

import signal
from collections.abc import Mapping

import psutil
from far_cluster import ROUTERS
from lossy_link import Link, everything, nothing
from test_server_faults import schedulers
from transfer_peers import wait_for

from sglang_apb.commands.polling import ask_chat, is_up
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalCluster

STOP, KILL, CUT = FAULTS = ("STOP", "KILL", "CUT")
TARGETS = ("prefill0", "prefill1", "decode", "router")
RESTART_S = 240.0


class Striker:
    """Of one process of `cluster` at a time; `urls` are where its servers and its router are asked."""

    def __init__(self, cluster: LocalCluster, link: Link | None, urls: Mapping[str, str]) -> None:
        self._cluster, self._link, self._urls = cluster, link, urls
        self._struck: tuple[str, str] | None = None

    def strike(self, target: str, fault: str) -> None:
        self._struck = target, fault
        if fault == CUT:
            self._cut(target)
            return
        for process in self._processes(target):
            process.send_signal(signal.SIGSTOP if fault == STOP else signal.SIGKILL)

    def bring_back(self) -> None:
        """Goes on with what was stopped or cut, or starts what was killed on the same ports; else a no-op."""
        if self._struck is None:
            return
        (target, fault), self._struck = self._struck, None
        if fault == CUT:
            assert self._link is not None
            self._link.passes = everything
        elif fault == STOP:
            for process in self._processes(target):
                process.send_signal(signal.SIGCONT)
        else:
            self._restart(target.rstrip("01"))

    def _cut(self, target: str) -> None:
        """For decode everything; for a prefill rank, what goes to or comes from where it listens."""
        assert self._link is not None
        if target == "decode":
            self._link.passes = nothing
        elif target == "router":
            self._link.passes = lambda ends: not any(host == ROUTERS for host, _ in ends)
        else:
            (rank,) = self._processes(target)
            ports = {c.laddr.port for c in rank.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            self._link.passes = lambda ends: not any(port in ports for _, port in ends)

    def _restart(self, name: str) -> None:
        group = self._group(name)
        group.stop()
        group.start()
        url = self._urls[name]
        assert wait_for(lambda: ask_chat(url).is_ok if name == "router" else is_up(url), RESTART_S), group.log_tail()

    def _group(self, name: str) -> ProcessGroup:
        return self._cluster.groups[("prefill", "decode", "router").index(name)]

    def _processes(self, target: str) -> list[psutil.Process]:
        if target == "router":
            return psutil.Process(self._group(target).pid).children(recursive=True)
        rank = int(target[-1]) if target[-1].isdigit() else 0
        return [schedulers(self._cluster, target.rstrip("01"))[rank]]
