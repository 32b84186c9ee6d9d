"""Hosts that share the ranks of a server: how they find each other, and how they learn that one is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import next_port
from transfer_peers import wait_for

from sglang_apb.host_group import FirstHost, HostGroupError, HostWatch, Route, route_to, use_route

SAME = {"--sp-size": "3", "--prefill-backend": "apb"}
HOST = """
import sys, threading, time
from sglang_apb.host_group import FirstHost, HostWatch
port, number, settings = int(sys.argv[1]), int(sys.argv[2]), dict(pair.split("=") for pair in sys.argv[3:])
ended = threading.Event()
def end(reason):
    print(reason, flush=True)
    ended.set()
watch = HostWatch(FirstHost("127.0.0.1", port), 3, number, settings, end)
print("started", flush=True)
watch.start()
ended.wait()
"""


class Host:
    """A process that watches, and says why it ends."""

    def __init__(self, port: int, number: int, settings: dict[str, str] = SAME) -> None:
        pairs = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-c", HOST, str(port), str(number), *pairs]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        assert self.output.readline() == "started\n"

    def reason(self, within: float = 5.0) -> str:
        self.process.wait(within)
        return self.output.read().strip()


@pytest.fixture
def three() -> Iterator[list[Host]]:
    port = next_port()
    hosts = [Host(port, number) for number in (1, 0, 2)]
    hosts.sort(key=lambda host: host.process.args[4])  # type: ignore[index]
    time.sleep(1)
    assert all(host.process.poll() is None for host in hosts)
    yield hosts
    for host in hosts:
        host.process.kill()
        host.process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["ends", "hangs"])
def test_when_one_host_is_gone_all_end_within_four_seconds(three: list[Host], how: signal.Signals) -> None:
    first, second, third = three
    started = time.monotonic()
    os.kill(second.process.pid, how)
    name = socket.gethostname()
    assert first.reason() == f"Host 1 ({name}) is gone: it has ended, hangs, or cannot be reached."
    assert third.reason() == f"Host 0 ({name}) is gone: it has ended, hangs, or cannot be reached."
    assert time.monotonic() - started < 4.5


def test_when_the_first_host_hangs_all_others_end(three: list[Host]) -> None:
    os.kill(three[0].process.pid, signal.SIGSTOP)
    assert {host.reason().partition(" (")[0] for host in three[1:]} == {"Host 0"}


def test_a_host_that_was_stopped_for_too_long_ends_when_it_goes_on(three: list[Host]) -> None:
    os.kill(three[1].process.pid, signal.SIGSTOP)
    three[0].reason()
    os.kill(three[1].process.pid, signal.SIGCONT)
    assert three[1].reason().startswith("Host 0")


def test_whoever_knocks_and_goes_changes_nothing(three: list[Host]) -> None:
    port = int(three[0].process.args[3])  # type: ignore[index]
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(4)
    assert all(host.process.poll() is None for host in three)


def test_a_stranger_that_comes_between_a_hosts_connection_and_its_greeting_is_not_taken_for_it() -> None:
    port, relayed = next_port(), next_port()
    with contextlib.ExitStack() as stack:
        first = Host(port, 0)
        stack.callback(first.process.kill)
        assert wait_for(lambda: not why_not_there(port + 1))
        with socket.create_server(("127.0.0.1", relayed + 1)) as door:
            second = Host(relayed, 1)
            stack.callback(second.process.kill)
            there = door.accept()[0]
        here = socket.create_connection(("127.0.0.1", port + 1))
        with socket.create_connection(("127.0.0.1", port + 1)):
            for ways in ((here, there), (there, here)):
                threading.Thread(target=relay, args=ways, daemon=True).start()
            time.sleep(1)
        time.sleep(1)
        assert first.process.poll() is None and second.process.poll() is None
        second.process.kill()
        assert first.reason().startswith("Host 1 (")


def why_not_there(port: int) -> str:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError as error:
        return str(error)
    return ""


def relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def test_hosts_that_were_started_otherwise_do_not_go_together() -> None:
    port = next_port()
    first, second = Host(port, 0), Host(port, 1, SAME | {"--prefill-backend": "none"})
    assert first.reason().endswith("has --prefill-backend none, and host 0 has apb: start all alike.")
    assert second.reason().endswith("has --prefill-backend apb, and host 1 has none: start all alike.")


def test_an_address_that_is_not_the_hosts_own_is_refused() -> None:
    with pytest.raises(HostGroupError, match=r"cannot listen at tcp://192.0.2.1:\d+, where host 1 is to be heard"):
        HostWatch(FirstHost("192.0.2.1", next_port()), 2, 0, SAME, print).start()


def test_the_first_hosts_address_is_read() -> None:
    assert FirstHost.parse("10.0.0.1:25000") == ("10.0.0.1", 25000)
    assert FirstHost.parse("tcp://[fd00::1]:25000") == ("fd00::1", 25000)
    for text in ("10.0.0.1", "10.0.0.1:", ":25000", "h:99999", "h:x"):
        with pytest.raises(HostGroupError, match="must be HOST:PORT of the first host"):
            FirstHost.parse(text)


def test_the_network_is_that_of_the_way_to_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert route_to(FirstHost("127.0.0.1", 1)) == Route("127.0.0.1", "lo")

    def knows_no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", knows_no_name)
    with pytest.raises(HostGroupError, match="no way leads from here to nowhere"):
        route_to(FirstHost("nowhere", 1))


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "ib0"}
    assert use_route(Route("10.0.0.2", "eth1"), environment) == ["NCCL_SOCKET_IFNAME==eth1", "SGLANG_HOST_IP=10.0.0.2"]
    assert environment == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=eth1",
        "SGLANG_HOST_IP": "10.0.0.2",
    }
