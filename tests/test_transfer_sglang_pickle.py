"""Nothing that comes over the network is ever run: no code that could, and a payload that would show it."""

from __future__ import annotations

import ast
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import next_port
from hostile import FakeDecode, FakePrefill
from transfer_peers import asked, cluster, received, send_owned

from sglang_apb.commands.servers import is_up
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Kind
from sglang_apb.transfer.sglang.bootstrap import ZmqKVBootstrapServer

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sglang_apb", "kernels", "patches")
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "recv_pyobj", "send_pyobj", "recv_serialized", "loads", "load"}
# JSON, our own modules that read the user's files, and calls of that name that are something else.
ALLOWED = {
    ("tomllib", "loads"),
    *(("json", "loads"), ("backends", "load"), ("keys", "load"), ("transfer_keys", "load")),
    *(("tl", "load"), ("re", "compile")),
}

# The settings that an installed package brings along, by `safe_load`; nothing that anybody sends.
READS_YAML = "sglang_apb/commands/eval/ruler.py"


def test_no_module_can_run_what_it_is_sent() -> None:
    found = []
    for path in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            what = _suspect(node)
            if what is not None and (what, str(path.relative_to(ROOT))) != ("yaml", READS_YAML):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {what}")
    assert not found, "\n".join(found)


def _suspect(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import):
        return next((alias.name for alias in node.names if alias.name.split(".")[0] in MODULES), None)
    if isinstance(node, ast.ImportFrom):
        return node.module if (node.module or "").split(".")[0] in MODULES else None
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id if node.func.id in CALLS else None
    if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
        owner = ast.unparse(node.func.value)
        return None if (owner, node.func.attr) in ALLOWED else f"{owner}.{node.func.attr}"
    return None


@pytest.mark.parametrize("code", ["import pickle", "from marshal import loads", "eval(x)", "pickle.loads(x)"])
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert any(_suspect(node) for node in ast.walk(ast.parse(code)))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_is_sent_does_nothing(tmp_path: Path) -> None:
    """In every kind of frame to both sides, alone, and to the bootstrap server."""
    path = tmp_path / "run"
    payload = pickle.dumps(Touch(path))
    with cluster() as peers, FakeDecode(peers) as stranger, FakePrefill() as prefill:
        room = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        _, attempt = prefill.wait_for_ask()
        for kind in Kind:
            with_payload = payload if kind in (Kind.DATA, Kind.AUX) else None
            frame = wire.pack(kind, 1, attempt, payload, with_payload)
            for parts in (frame, [payload], [payload] * 3):
                stranger.send(list(parts))
                prefill.send(list(parts))
        decode, sending = peers.ask(2, np.arange(8)), peers.senders[0].open(2)
        assert asked(sending)
        send_owned(peers.senders[0], sending, np.arange(8), [(0, 8)], 0)
        assert received(decode)
        peers.receiver.close(room)
    port = next_port()
    server = ZmqKVBootstrapServer("127.0.0.1", port)
    try:
        deadline = time.monotonic() + 30
        while not is_up(f"http://127.0.0.1:{port}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert requests.put(f"http://127.0.0.1:{port}/route", data=payload, timeout=5).status_code == 400
    finally:
        server.close()
    assert not path.exists()
    pickle.loads(payload)
    assert path.exists(), "the payload would not have shown it"
