"""Several hosts whose ranks share a prompt: by which network they speak, and whether they are all there.

    host 0  listens at PORT + i   <-- a connection, with ZMQ's pings both ways -->   host i

PORT is that of `--dist-init-addr`. Collectives wait for a host that is gone, so nothing here is one: the watch has a
thread and connections of its own, in the process that started the host's ranks, and ZMQ's own threads ping.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import psutil
import zmq
from zmq.utils.monitor import parse_monitor_message

logger = logging.getLogger(__name__)

# A host is gone when no answer to a ping has come for SILENCE_MS: after 0.5 to 3 s.
PING_MS = 500
SILENCE_MS = 2500
_MAX_HELLO_BYTES = 1 << 16
_LINGER_MS = 200  # for a greeting by which the other host sees what differs
_CONNECTED = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED


class HostGroupError(ValueError):
    """These hosts cannot form a group; the text says why, and what to do."""


class FirstHost(NamedTuple):
    """Of `--dist-init-addr`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> FirstHost:
        """Raises HostGroupError."""
        host, _, port = text.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise HostGroupError(f"--dist-init-addr {text} must be HOST:PORT of the first host, such as 10.0.0.1:25000")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))


@dataclass(frozen=True)
class Route:
    """This host's address, and its network interface, on the way to the first host."""

    address: str
    interface: str


def route_to(first: FirstHost) -> Route:
    """Raises HostGroupError without one. Nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(first.host, first.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            address = probe.getsockname()[0].partition("%")[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise HostGroupError(f"--dist-init-addr: no way leads from here to {first.host}: {why}") from error
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return Route(address, interface)
    raise HostGroupError(f"--dist-init-addr: no network interface of this host has its address {address}")


def use_route(route: Route, environment: MutableMapping[str, str]) -> list[str]:
    """Sets by which network gloo, NCCL and SGLang speak, unless the user has; gives what it has set.

    Left alone, gloo takes the address of the host's name, which may be loopback's.
    """
    wanted = {
        "GLOO_SOCKET_IFNAME": route.interface,
        "NCCL_SOCKET_IFNAME": f"={route.interface}",  # that one, and none that only begins so
        "SGLANG_HOST_IP": route.address,
    }
    new = {name: value for name, value in wanted.items() if not environment.get(name)}
    environment.update(new)
    return [f"{name}={value}" for name, value in new.items()]


class Hello(msgspec.Struct):
    """What hosts tell each other once: `settings` must be the same on all of them."""

    name: str
    settings: dict[str, str]


class HostWatch:
    """Calls `on_end` once, in a thread of its own, with a sentence: when another host is gone, or has other settings.

    Host 0 watches all others, each of them host 0; when that one ends its ranks, all end theirs.
    """

    def __init__(
        self, first: FirstHost, num_hosts: int, number: int, settings: dict[str, str], on_end: Callable[[str], None]
    ) -> None:
        self._hello = Hello(socket.gethostname(), settings)
        self._on_end = on_end
        self._context = zmq.Context()
        others = range(1, num_hosts) if number == 0 else [0]
        self._links = [_Link(self._context, first, number, other) for other in others]
        self._thread = threading.Thread(target=self._run, name="host watch", daemon=True)

    def start(self) -> None:
        """Raises HostGroupError when it cannot listen."""
        try:
            for link in self._links:
                link.open()
        except HostGroupError:
            self._context.destroy(linger=0)  # whoever collects a context with open sockets waits for ever
            raise
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        for link in self._links:
            poller.register(link.monitor, zmq.POLLIN)
            poller.register(link.socket, zmq.POLLIN)
        while (reason := self._look()) is None:
            poller.poll()
        self._on_end(reason)
        self._context.destroy(linger=_LINGER_MS)

    def _look(self) -> str | None:
        """Why the group must end, if it must: also when nobody would watch any more."""
        try:
            return next(filter(None, (link.step(self._hello) for link in self._links)), None)
        except Exception as error:
            logger.exception("the watch over the other hosts failed")
            return f"The watch over the other hosts failed ({type(error).__name__}: {error})."


class _Link:
    """To one other host. Strangers, whose connections speak no ZMQ, come and go."""

    def __init__(self, context: zmq.Context, first: FirstHost, number: int, other: int) -> None:
        self._first, self._number, self._other = first, number, other
        self._name = ""
        self._is_there = False
        # Connections by their numbers: all, and those of which one is the other host's.
        self._open: set[int] = set()
        self._theirs: set[int] = set()
        self.socket = context.socket(zmq.PAIR)
        # Both ping: what either sends ends the other's watch until its own next ping.
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, _MAX_HELLO_BYTES)
        self.socket.setsockopt(zmq.IPV6, 1)
        self.monitor = self.socket.get_monitor_socket(
            _CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    def open(self) -> None:
        host = f"[{self._first.host}]" if ":" in self._first.host else self._first.host
        place = f"tcp://{host}:{self._first.port + max(self._number, self._other)}"
        if self._number != 0:
            self.socket.connect(place)
            return
        try:
            self.socket.bind(place)
        except zmq.ZMQError as error:
            raise HostGroupError(
                f"this host cannot listen at {place}, where host {self._other} is to be heard ({error}): the first "
                "host's --dist-init-addr must be an address of its own, with the ports that follow free"
            ) from error

    def step(self, hello: Hello) -> str | None:
        """Takes what has come. Why the group must end, if it must."""
        while self.monitor.poll(0):
            self._take(parse_monitor_message(self.monitor.recv_multipart()), hello)
        if self.socket.poll(0):
            message = self.socket.recv(copy=False)
            self._theirs &= {message.get(zmq.SRCFD)}
            if difference := self._compare(hello, message.bytes):
                return difference
        if self._is_there and not self._theirs:
            return f"{self._shown()} is gone: it has ended, hangs, or cannot be reached."
        return None

    def _take(self, event: Any, hello: Hello) -> None:
        if event["event"] & _CONNECTED:
            self._open.add(event["value"])
        elif event["event"] == zmq.EVENT_DISCONNECTED:
            self._open.discard(event["value"])
            self._theirs.discard(event["value"])
        elif not self._is_there:  # a handshake, but not of which connection
            self._is_there, self._theirs = True, set(self._open)
            try:
                self.socket.send(msgspec.msgpack.encode(hello), zmq.NOBLOCK)
            except zmq.Again:  # it has gone since
                self._theirs.clear()

    def _compare(self, ours: Hello, message: bytes) -> str | None:
        try:
            theirs = msgspec.msgpack.decode(message, type=Hello)
        except msgspec.MsgspecError:
            return f"{self._shown()} sent what is no greeting: is it another version of sglang-apb?"
        self._name = theirs.name
        logger.info("%s is there", self._shown())
        for name in sorted(ours.settings.keys() | theirs.settings.keys()):
            here, there = ours.settings.get(name), theirs.settings.get(name)
            if here != there:
                return f"{self._shown()} has {name} {there}, and host {self._number} has {here}: start all alike."
        return None

    def _shown(self) -> str:
        return f"Host {self._other} ({self._name})" if self._name else f"Host {self._other}"
