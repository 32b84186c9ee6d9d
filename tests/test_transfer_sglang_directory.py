"""Where prefill servers are: what is found is used while it is true, and silence is that of now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from sglang.srt.disaggregation.common.conn import PrefillServerInfo
from transfer_peers import wait_for

from sglang_apb.transfer.sglang import directory
from sglang_apb.transfer.sglang.directory import Entry, NotThere, PrefillDirectory

ADDRESS = "127.0.0.1:8998"
HOUR = 3600.0


class Server:
    """A prefill server's ports, asked with a clock that is set by hand. It answers when `answers` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.port, self.is_up = 0.0, 4000, True
        self.answers = threading.Event()
        self.known = PrefillDirectory(lambda info: None)
        self.known._look_up = self.look_up  # type: ignore[assignment]
        monkeypatch.setattr(directory, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(directory, "WAIT_S", 0.01)

    def look_up(self, address: str) -> Entry:
        port = self.port
        assert self.answers.wait(10.0)
        if not self.is_up:
            raise NotThere("Connection refused")
        info = PrefillServerInfo(1, 1, 1, 1, page_size=1, kv_cache_dtype="auto", follow_bootstrap_room=True)
        return Entry(info, {address: [{"rank_port": port}]})

    def find(self) -> Entry | None:
        return self.known.find(ADDRESS)

    def find_port(self) -> int:
        """Of an entry that is there, or comes at one of the next polls."""
        entry: Entry | None = None

        def is_found() -> bool:
            nonlocal entry
            entry = self.find()
            return entry is not None

        assert wait_for(is_found) and entry is not None and entry.refusal == ""
        port: int = entry.ranks[ADDRESS][0]["rank_port"]
        return port

    def answer(self) -> None:
        self.answers.set()
        asked = self.known._asked[ADDRESS].lookup
        assert asked is not None and wait_for(asked.done)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


@pytest.mark.parametrize("pause", [directory.MAX_AGE_S + 1, HOUR])
def test_what_was_found_for_a_request_that_went_away_is_not_used_later(pause: float, server: Server) -> None:
    assert server.find() is None
    server.answer()
    server.now, server.port = pause, 5000
    assert server.find_port() == 5000


def test_what_a_busy_scheduler_comes_for_late_is_used(server: Server) -> None:
    """It would else never find a server that answers slowly."""
    for second in range(0, 20, 4):
        server.now = second
        assert server.find() is None
    server.answer()
    server.answers.clear()
    server.now += 4
    entry = server.find()
    assert entry is not None and entry.refusal == ""


def was_slow(server: Server) -> None:
    assert server.find() is None
    server.answer()


def was_starting(server: Server) -> None:
    server.is_up = False
    was_slow(server)
    server.is_up = True


def was_stopped(server: Server) -> None:
    assert server.find() is None


@pytest.mark.parametrize("before", [was_slow, was_starting, was_stopped])
@pytest.mark.parametrize("pause", [directory.GIVE_UP_S + 0.1, HOUR])
def test_a_server_that_was_silent_once_is_not_said_to_be_gone(
    pause: float, before: Callable[[Server], None], server: Server
) -> None:
    """The request that asked then is gone."""
    before(server)
    server.now = pause
    entry = server.find()
    assert entry is None or entry.refusal == ""
    server.answers.set()
    server.find_port()


def test_a_server_that_is_asked_again_and_again_is_given_up(server: Server) -> None:
    for tenth in range(int(10 * directory.GIVE_UP_S)):
        server.now = tenth / 10
        assert server.find() is None
    server.now = directory.GIVE_UP_S
    entry = server.find()
    assert entry is not None and entry.refusal == f"The prefill server at {ADDRESS} does not answer."
    assert server.find() is None, "the next request asks anew"
    server.answers.set()


def test_addresses_that_lead_nowhere_hold_no_other_up_and_are_forgotten(server: Server) -> None:
    lookup = server.look_up
    quick = Entry(PrefillServerInfo(1, 1, 1, 1, page_size=1, kv_cache_dtype="auto", follow_bootstrap_room=True))
    server.known._look_up = lambda address: quick if address == ADDRESS else lookup(address)  # type: ignore[assignment]
    for number in range(20):
        assert server.known.find(f"10.0.0.{number}:1") is None
    assert wait_for(lambda: server.find() is quick, 1.0)
    server.now = HOUR
    server.known.find("10.0.0.99:1")
    assert list(server.known._asked) == ["10.0.0.99:1"]
    server.answers.set()


@pytest.mark.parametrize(
    "host", ["bad host", "", "x" * 100_000, "a" * 64 + ".b", "a\nb", "::::", "\udcff", "[", "ü" * 99]
)
@pytest.mark.parametrize("port", [99999999, -1, 1, "a"])
def test_an_address_that_is_none_fails_its_requests_with_a_short_sentence(
    host: str, port: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "GIVE_UP_S", 0.0)
    known = PrefillDirectory(lambda info: None)
    entry = known.find(f"{host}:{port}")
    assert entry is not None and len(entry.refusal) < 1000 and entry.refusal.isprintable()
    assert "does not answer" in entry.refusal
    with pytest.raises(NotThere) as error:
        known._look_up(f"{host}:{port}")
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()
