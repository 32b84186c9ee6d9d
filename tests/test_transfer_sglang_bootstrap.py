"""What is said over HTTP before a transfer: what is let in, and servers that do not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import next_port
from sglang.srt.disaggregation.common.conn import PrefillServerInfo

from sglang_apb.commands.servers import is_up
from sglang_apb.transfer.protocol.hosts import why_not_free
from sglang_apb.transfer.sglang import directory
from sglang_apb.transfer.sglang.bootstrap import MAX_ROOMS, ZmqKVBootstrapServer
from sglang_apb.transfer.sglang.directory import PrefillDirectory

REGISTRATION: dict[str, Any] = {
    "attn_tp_size": 1,
    "attn_tp_rank": 0,
    "attn_cp_size": 2,
    "attn_cp_rank": 0,
    "attn_dp_size": 1,
    "attn_dp_rank": 0,
    "pp_size": 1,
    "pp_rank": 0,
    "system_dp_size": 1,
    "system_dp_rank": 0,
    "rank_ip": "127.0.0.1",
    "rank_port": 4000,
    "page_size": 1,
    "kv_cache_dtype": "auto",
    "load_balance_method": "follow_bootstrap_room",
    "enable_dsa_cache_layer_split": False,
    "prefill_http_port": 30001,
}


@pytest.fixture
def address() -> Iterator[str]:
    port = next_port()
    server = ZmqKVBootstrapServer("127.0.0.1", port)
    deadline = time.monotonic() + 30
    while not is_up(f"http://127.0.0.1:{port}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    server.close()


def test_a_server_that_cannot_listen_ends_at_once_and_the_first_goes_on(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options were checked, but both were started at the same moment."""
    port = int(address.rpartition(":")[2])
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(SystemExit) as end:
            ZmqKVBootstrapServer(host, port)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert f"sglang: error: port {port} for the bootstrap server is not free (Address already in use): end" in said
    assert register(address).status_code == 200


def test_a_server_listens_once_it_is_made() -> None:
    port = next_port()
    server = ZmqKVBootstrapServer("127.0.0.1", port)
    try:
        assert is_up(f"http://127.0.0.1:{port}")
    finally:
        server.close()


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_is_taken_where_one_of_a_hosts_addresses_is(listening: str) -> None:
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with socket.create_server((listening, 0), family=family) as listener:
        port = listener.getsockname()[1]
        assert why_not_free(listening, port) == "Address already in use"
        assert why_not_free("0.0.0.0" if family == socket.AF_INET else "::", port) == "Address already in use"
    assert why_not_free(listening, port) == ""
    assert why_not_free("192.0.2.1", port) == "", "not an address of this machine, and not for another to have"
    assert why_not_free("no.such.host.invalid", port) == ""


def register(address: str, **changed: Any) -> requests.Response:
    return requests.put(f"http://{address}/route", json=REGISTRATION | changed, timeout=5)


def both_ranks(info: PrefillServerInfo) -> None:
    """As SGLang does for a decode server of one rank."""
    info.target_tp_rank, info.target_tp_ranks, info.target_cp_ranks = 0, [0], [0, 1]


def test_a_server_is_found_with_its_ranks_once_all_are_there(address: str) -> None:
    known = PrefillDirectory(both_ranks)
    assert register(address).status_code == 200
    assert known.find(address) is None, "one of two ranks"
    assert register(address, attn_cp_rank=1, rank_port=4001).status_code == 200
    entry = known.find(address)
    assert entry is not None and entry.refusal == ""
    assert (entry.info.attn_cp_size, entry.info.page_size, entry.info.prefill_http_port) == (2, 1, 30001)
    ports = {key: [rank["rank_port"] for rank in ranks] for key, ranks in entry.ranks.items()}
    assert ports == {f"{address}_0_0_0": [4000], f"{address}_0_1_0": [4001]}


@pytest.mark.parametrize(
    "changed",
    [
        {"rank_port": 0},
        {"rank_port": "4000; rm"},
        {"rank_ip": "attacker.example"},
        {"rank_ip": "x" * 10_000},
        {"attn_cp_size": 10**9},
        {"attn_cp_rank": -1},
        {"attn_cp_rank": {"a": 1}},
        {"page_size": 0},
        {"kv_cache_dtype": None},
        {"load_balance_method": ["x"]},
    ],
)
def test_a_registration_out_of_bounds_is_refused(address: str, changed: dict[str, Any]) -> None:
    answer = register(address, **changed)
    assert answer.status_code == 400 and "not a Registration" in answer.text
    assert register(address).status_code == 200


def test_other_bad_requests_are_refused(address: str) -> None:
    url = f"http://{address}"
    deep = "[" * 100_000
    assert requests.put(f"{url}/route", data=deep, timeout=5).status_code == 400
    assert requests.put(f"{url}/route", data=b"x" * (2 << 20), timeout=5).status_code == 413
    assert requests.get(f"{url}/route", params={"prefill_dp_rank": "1e9"}, timeout=5).status_code == 400
    too_many = {"bootstrap_rooms": list(range(MAX_ROOMS + 1))}
    assert requests.post(f"{url}/query_dp_ranks", json=too_many, timeout=5).status_code == 400
    for body in ({"bootstrap_room": -1, "dp_rank": 0}, {"bootstrap_room": 1 << 70, "dp_rank": 0}, {"dp_rank": 0}, []):
        assert requests.post(f"{url}/register_dp_rank", json=body, timeout=5).status_code == 400
    assert requests.post(f"{url}/register_dp_rank", json={"bootstrap_room": 7, "dp_rank": 1}, timeout=5).ok
    assert requests.post(f"{url}/query_dp_ranks", json={"bootstrap_rooms": [7]}, timeout=5).json() == {"7": 1}


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_server_that_does_not_answer_holds_nobody_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port, or one that takes connections and never answers, as a stopped process does."""
    monkeypatch.setattr(directory, "GIVE_UP_S", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    if kind == "closed":
        listener.close()
    known = PrefillDirectory(both_ranks)
    started, longest, entry = time.monotonic(), 0.0, None
    while entry is None:
        asked = time.monotonic()
        entry = known.find(address)
        longest = max(longest, time.monotonic() - asked)
        time.sleep(0.05)
        assert time.monotonic() - started < 10
    listener.close()
    assert longest < 1, "the scheduler waited for a server that does not answer"
    assert entry.refusal == f"The prefill server at {address} does not answer."


@pytest.mark.parametrize("body", [b"{}", b"[1]", b'{"attn_tp_size": "x"}', b"x" * (2 << 20), b"\xff\xfe"])
def test_an_answer_that_cannot_be_is_no_answer(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(directory.NotThere, match="answered what cannot be"):
            directory.Lookup(both_ranks)(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
