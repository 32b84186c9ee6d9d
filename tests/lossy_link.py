"""A network of two machines on one: a namespace behind a link that delays, loses or cuts packets. Needs root and `ip`.

Packets go through two TUN devices and this process, since not every kernel has `tc`'s netem.

    this process, 10.77.0.1  <-- apb-here | Link | apb-there -->  namespace apb-far, 10.77.0.2 and 10.77.0.3
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

NAMESPACE = "apb-far"
HERE, THERE, ALSO_THERE = "10.77.0.1", "10.77.0.2", "10.77.0.3"
_DEVICES = ("apb-here", "apb-there")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LARGEST_PACKET = 65536
_TCP = 6
_MTU = "9000"  # so that a burst of KV is not more packets than this process can pass on

# Address and port; port 0 where the packet has none.
End: TypeAlias = tuple[str, int]


def everything(ends: tuple[End, End]) -> bool:
    return True


def nothing(ends: tuple[End, End]) -> bool:
    return False


class Link:
    """`delay_s` each way, and a share `loss` of all packets lost. Of the others those pass that `passes` lets through,
    which is asked with both ends of a packet's connection.
    """

    def __init__(self, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        self.delay_s, self.loss = delay_s, loss
        self.passes: Callable[[tuple[End, End]], bool] = everything
        self._random = random.Random(seed)
        self._ending = threading.Event()

    def __enter__(self) -> Link:
        _remove()
        _ip("netns", "add", NAMESPACE)
        self._ends = [_open_tun(name) for name in _DEVICES]
        here, there = _DEVICES
        _ip("addr", "add", HERE, "peer", THERE, "dev", here)
        _ip("link", "set", here, "mtu", _MTU, "up")
        _ip("route", "add", ALSO_THERE, "dev", here, "src", HERE)
        _ip("link", "set", there, "netns", NAMESPACE)
        _ip("-n", NAMESPACE, "addr", "add", THERE, "peer", HERE, "dev", there)
        _ip("-n", NAMESPACE, "addr", "add", f"{ALSO_THERE}/32", "dev", there)
        _ip("-n", NAMESPACE, "link", "set", there, "mtu", _MTU, "up")
        _ip("-n", NAMESPACE, "link", "set", "lo", "up")
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)
        _remove()

    def _forward(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []  # when, number, to which end, packet
        numbers = itertools.count()
        while not self._ending.is_set():
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # the device is not up yet
                    os.write(end, packet)
            wait = min(under_way[0][0] - now, 0.05) if under_way else 0.05
            for end in select.select(self._ends, [], [], max(wait, 0))[0]:
                packet = os.read(end, _LARGEST_PACKET)
                if not self.passes(_ends_of(packet)) or self._random.random() < self.loss:
                    continue
                other = self._ends[1 - self._ends.index(end)]
                heapq.heappush(under_way, (time.monotonic() + self.delay_s, next(numbers), other, packet))


def _ends_of(packet: bytes) -> tuple[End, End]:
    """Of an IPv4 packet, source and destination."""
    if packet[0] >> 4 != 4:
        return ("", 0), ("", 0)
    header = 4 * (packet[0] & 15)
    source_port, port = struct.unpack_from("!HH", packet, header) if packet[9] == _TCP else (0, 0)
    return (socket.inet_ntoa(packet[12:16]), source_port), (socket.inet_ntoa(packet[16:20]), port)


def enter_namespace() -> None:
    """Moves the calling thread, and threads that it starts, behind the link."""
    with open(f"/var/run/netns/{NAMESPACE}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def can_be_made() -> bool:
    """Whether this user may make one here."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not os.path.exists("/dev/net/tun"):
        return False
    try:
        with Link():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _open_tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _remove() -> None:
    """Of this run, or of one that was killed. The devices go with their files."""
    subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True)
