"""Hosts of one network on this machine: namespaces on a bridge, each with its own address, name and /dev/shm.

    this machine, 10.78.0.254 --+-- bridge --+-- host 0, 10.78.0.1
                                             +-- host 1, 10.78.0.2 ...

Needs root and `ip`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

_BRIDGE = "apb-hosts"
_HERE = "10.78.0.254/24"
# With a mount namespace of its own, or ranks would find each other by files; and names that lead to real addresses.
_ENTER = """
hostname "$1"; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2" /etc/hosts; shift 2; exec "$@"
"""


def why_not_here() -> str:
    """Empty where there can be such hosts."""
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return "needs root" if not missing else f"needs {', '.join(missing)}"
    made = subprocess.run(["ip", "link", "add", _BRIDGE, "type", "bridge"], capture_output=True, text=True)
    _remove_bridge()
    return "" if made.returncode == 0 else f"no bridge: {made.stderr.strip()}"


class Hosts:
    """`num_hosts` of them while this is entered."""

    def __init__(self, num_hosts: int, folder: Path) -> None:
        self.addresses = [f"10.78.0.{number + 1}" for number in range(num_hosts)]
        self._names_file = folder / "hosts"

    def __enter__(self) -> Hosts:
        self._remove()
        names = [f"{address} {self.name(number)}" for number, address in enumerate(self.addresses)]
        self._names_file.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", _HERE, "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number, address in enumerate(self.addresses):
            name, cable = self.name(number), self._cable(number)
            _ip("netns", "add", name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", cable, "master", _BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @staticmethod
    def name(number: int) -> str:
        return f"apb-host{number}"

    @staticmethod
    def _cable(number: int) -> str:
        return f"apb-cable{number}"

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """That runs `command` on a host."""
        name = self.name(number)
        enter = ["nsenter", f"--net=/run/netns/{name}"]
        enter += ["unshare", "--mount", "--uts", "--ipc", "--propagation", "private"]
        return [*enter, "sh", "-c", _ENTER, "sh", name, str(self._names_file), *command]

    def cut_off(self, number: int) -> None:
        """Nothing leaves or reaches the host any more."""
        _ip("link", "set", self._cable(number), "down")

    def signal(self, number: int, what: signal.Signals) -> None:
        """To every process of the host at once, as far as that can be."""
        for process in self.processes(number):
            process.send_signal(what)

    def processes(self, number: int) -> list[psutil.Process]:
        """Those that are in the host's network."""
        found = subprocess.run(["ip", "netns", "pids", self.name(number)], capture_output=True, text=True)
        return [psutil.Process(int(pid)) for pid in found.stdout.split() if psutil.pid_exists(int(pid))]

    def _remove(self) -> None:
        for number in range(len(self.addresses)):
            self.signal(number, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.name(number)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._cable(number)], capture_output=True)
        _remove_bridge()


def _remove_bridge() -> None:
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
