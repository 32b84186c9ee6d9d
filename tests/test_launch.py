"""Servers as process groups: they start together, tell what went wrong, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from sglang_apb import cli
from sglang_apb.commands import CommandError, launch
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import (
    LocalCluster,
    LocalService,
    ServiceError,
    check_ports,
    place,
    value_of,
)

ROOT = Path(__file__).parents[1]
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
# Answers every POST with the next of the statuses on its command line, and goes on with the last one.
FAKE_ROUTER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
statuses = [int(status) for status in sys.argv[2:]]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# Of a server with --api-key: it is healthy for everybody, and answers who has the key.
FAKE_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
role, port, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": role}, "finish_reason": "stop"}]}
info = {"model_path": "m", "served_model_name": "m", "disaggregation_mode": role, "is_generation": True}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_known = self.path == "/health" or self.headers.get("Authorization") == f"Bearer {key}"
        text = json.dumps((answer if self.command == "POST" else info) if is_known else {"error": "Unauthorized"})
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    do_POST = do_GET
    def log_message(self, *args):
        pass
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# What `sglang-apb launch` runs, with fake servers.
DRIVER = """
import sys
from pathlib import Path
from sglang_apb import cli
from sglang_apb.commands import launch
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import LocalService
port, folder, server, router = sys.argv[1:]
python = [sys.executable, "-c"]
groups = [
    ProcessGroup("prefill server", [*python, server], Path(folder) / "prefill.log"),
    ProcessGroup("router", [*python, router, port, "200"], Path(folder) / "router.log"),
]
launch._cluster = lambda args: LocalService(groups, f"http://127.0.0.1:{port}", {"router": int(port)})
sys.exit(cli.main(["launch", "--model", "none"]))
"""
# Does what SGLang's servers do: a child in another session, deaf to SIGTERM, with shared memory and a file.
STUBBORN_SERVER = """
import mmap, os, signal, subprocess, sys, tempfile, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-c", open("/proc/self/cmdline").read().split(chr(0))[2], "child"],
                     start_new_session=True)
tempfile.NamedTemporaryFile(delete=False)
descriptor = os.open(f"/dev/shm/apb_test_{os.getpid()}", os.O_CREAT | os.O_RDWR)
os.ftruncate(descriptor, 4096)
memory = mmap.mmap(descriptor, 4096)
time.sleep(600)
"""


@pytest.fixture
def port() -> int:
    """The first of 7 free ports, below the range that the kernel gives to clients."""
    for first in range(21000 + os.getpid() % 5000, 32000, 7):
        with contextlib.suppress(CommandError):
            check_ports({f"test {port}": port for port in range(first, first + 7)})
            return first
    raise AssertionError("no 7 free ports in a row")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where guards make theirs, instead of /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def launched(tmp_path: Path, temporary: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`sglang-apb launch` with a stubborn fake server, once it has printed READY."""
    command = [sys.executable, "-c", DRIVER, str(port), str(tmp_path), STUBBORN_SERVER, FAKE_ROUTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=_default_signals) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"READY http://127.0.0.1:{port}\n"
        _wait_for(lambda: len(_shared_memory(process.pid)) == 2)
        yield process
        process.kill()


def _default_signals() -> None:
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP; children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _wait_for(condition: Callable[[], object], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _shared_memory(pid: int) -> list[Path]:
    pids = [process.pid for process in psutil.Process(pid).children(recursive=True)]
    return [path for pid in pids if (path := Path(f"/dev/shm/apb_test_{pid}")).exists()]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_signal_ends_everything(
    launched: subprocess.Popen[str], temporary: Path, number: signal.Signals, status: int
) -> None:
    processes = psutil.Process(launched.pid).children(recursive=True)
    shared_memory = _shared_memory(launched.pid)
    assert len(processes) >= 5 and list(temporary.iterdir())

    launched.send_signal(number)

    assert launched.wait(timeout=20) == status
    _wait_for(lambda: not _alive(processes))
    assert not [path for path in shared_memory if path.exists()]
    assert list(temporary.iterdir()) == []


def test_a_dying_server_ends_all_and_its_log_is_shown(
    launched: subprocess.Popen[str], temporary: Path, tmp_path: Path
) -> None:
    processes = psutil.Process(launched.pid).children(recursive=True)
    router = next(process for process in processes if process.cmdline()[2:3] == [FAKE_ROUTER])

    router.kill()

    _, errors = launched.communicate(timeout=20)
    assert launched.returncode == 1
    assert "the router ended with status 137" in errors and str(tmp_path / "router.log") in errors
    assert not _alive(processes)
    assert list(temporary.iterdir()) == []


def test_stop_does_not_wait_for_a_forked_process_that_holds_the_pipe(tmp_path: Path) -> None:
    group = ProcessGroup("server", SLEEPER, tmp_path / "server.log")
    group.start()
    _wait_for(lambda: group.log_tail() == "up")
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    try:
        started = time.monotonic()
        group.stop()
        assert time.monotonic() - started < 10 and group.exit_status is not None
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def test_signals_that_come_while_a_group_is_stopped_leave_nothing(tmp_path: Path) -> None:
    """Closing the guard's standard input ends it, and so does each of them."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for _ in range(5):
        group = ProcessGroup("server", SLEEPER, tmp_path / "server.log", {"TMPDIR": str(temporary)})
        group.start()
        _wait_for(lambda group=group: group.log_tail() == "up")
        assert group.pid is not None
        group.request_stop()
        for _ in range(200):
            os.kill(group.pid, signal.SIGTERM)
            time.sleep(0.0001)
        group.stop()
        assert group.exit_status == 128 + signal.SIGTERM
        assert not list(temporary.iterdir())


# A signal that comes just when the guard has begun to clean up.
INTERRUPTED = """
import signal
from sglang_apb.commands import processes

def on_signals(handler, set_handlers=processes._on_signals):
    if handler is signal.SIG_IGN:
        signal.raise_signal(signal.SIGTERM)
    set_handlers(handler)

processes._on_signals = on_signals
processes.run_guarded(["true"])
"""


def test_a_signal_does_not_interrupt_the_cleaning_up(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", INTERRUPTED], stdin=subprocess.PIPE, env=environment, timeout=30, check=True)
    assert not list(tmp_path.iterdir())


def test_a_server_that_fails_at_start_is_named_with_its_last_words(tmp_path: Path, port: int) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such model\\n' + 'x' * 1000)"]
    groups = [
        ProcessGroup("prefill server", SLEEPER, tmp_path / "prefill.log"),
        ProcessGroup("decode server", failing, tmp_path / "decode.log"),
    ]
    service = LocalService(groups, f"http://127.0.0.1:{port}", {})
    with pytest.raises(ServiceError, match=r"decode server ended with status 1; .*\n.*no such model") as error, service:
        service.wait_ready(timeout=20)
    assert "x" * 400 not in str(error.value)
    assert groups[0].exit_status is not None


def test_ready_means_that_a_chat_completion_succeeded(tmp_path: Path, port: int) -> None:
    router = [sys.executable, "-c", FAKE_ROUTER, str(port), "503", "404", "500", "200"]
    reports: list[str] = []
    service = LocalService(
        [ProcessGroup("router", router, tmp_path / "router.log")], f"http://127.0.0.1:{port}", {}, reports.append
    )
    with service:
        started = time.monotonic()
        service.wait_ready(timeout=20)
        assert time.monotonic() - started > 1.5, "three failures come before the success"
        assert requests.post(service.url, json={}, timeout=5).ok


def test_a_refused_completion_is_an_error_at_once(tmp_path: Path, port: int) -> None:
    router = [sys.executable, "-c", FAKE_ROUTER, str(port), "400"]
    service = LocalService([ProcessGroup("router", router, tmp_path / "router.log")], f"http://127.0.0.1:{port}", {})
    with pytest.raises(ServiceError, match="refuses a chat completion"), service:
        service.wait_ready(timeout=20)


def fake_server(role: str, port: int, log_dir: Path) -> ProcessGroup:
    return ProcessGroup(role, [sys.executable, "-c", FAKE_SERVER, role, str(port), "secret"], log_dir / f"{role}.log")


def test_a_server_with_a_key_is_asked_with_it(tmp_path: Path, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    with LocalService([fake_server("server", port, tmp_path)], url, {}, api_key="secret") as service:
        service.wait_ready(timeout=20)
    started = time.monotonic()
    without = LocalService([fake_server("server", port, tmp_path)], url, {})
    with pytest.raises(ServiceError, match=r"refuses a chat completion: HTTP 401 .*Unauthorized"), without:
        without.wait_ready(timeout=60)
    assert time.monotonic() - started < 30, "no waiting changes that"


def test_the_router_asks_servers_with_their_key_and_its_clients_for_it(tmp_path: Path, port: int) -> None:
    """SGLang's router, before fake servers."""
    cluster = LocalCluster("m", port=port, log_dir=tmp_path, sp_size=1, arguments=["--api-key", "secret"])
    servers = (fake_server(role, port + i, tmp_path) for i, role in enumerate(("prefill", "decode"), 1))
    cluster.groups = (*servers, cluster.groups[2])
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}

    def ask(**headers: str) -> requests.Response:
        return requests.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers, timeout=20)

    with cluster:
        cluster.wait_ready(timeout=60)
        assert ask(Authorization="Bearer secret").json()["choices"][0]["message"]["content"] == "decode"
        assert ask().status_code == ask(Authorization="Bearer other").status_code == 401
        assert all(cluster._is_up(group) for group in cluster.groups)


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key", "first", "--api-key=secret"]])
def test_a_key_is_the_routers_too(given: list[str], tmp_path: Path) -> None:
    prefill, decode, router = LocalCluster("m", port=31990, log_dir=tmp_path, arguments=given).groups
    assert router.command[router.command.index("--api-key") + 1] == "secret"
    assert prefill.command[-len(given) :] == decode.command[-len(given) :] == tuple(given)
    assert "--api-key" not in LocalCluster("m", port=31990, log_dir=tmp_path).groups[2].command


def test_servers_with_different_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="prefill and decode need the same --api-key") as error:
        LocalCluster("m", port=31990, log_dir=tmp_path, prefill_arguments=["--api-key", "secret"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("option", launch._NOT_FOR_SERVERS)
def test_what_the_servers_are_given_already_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "serve", lambda cluster, timeout: 0)
    for given in (["--", option, "1"], ["--", f"{option}=1"], ["--decode-args", f"{option} 1"]):
        assert cli.main(["launch", "--model", "m", "--sp-size", "1", *given]) == 1
        assert f"{option} is not for the servers that launch starts: " in capsys.readouterr().err


# Errors, then more lines than are shown of a log, and on.
FAILING = """
import sys, time
print("[06:21:07] server_args={'api_key': 'secret', 'log_level': 'error: '}")
print("\x1b[31mValueError: no room for the model: use --max-total-tokens\x1b[0m")
print(*(f"line {i}" for i in range(30)), sep="\\n", flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_not_ready_in_time_says_who_does_not_answer_and_why(tmp_path: Path, port: int) -> None:
    router = [sys.executable, "-c", FAKE_ROUTER, str(port), "503"]
    groups = [
        ProcessGroup("prefill server", [sys.executable, "-c", FAILING, "600"], tmp_path / "prefill.log"),
        ProcessGroup("decode server", SLEEPER, tmp_path / "decode.log"),
        ProcessGroup("router", router, tmp_path / "router.log"),
    ]
    ports = {"router": port, "prefill server": port + 1, "decode server": port + 2}
    reports: list[str] = []
    service = LocalService(groups, f"http://127.0.0.1:{port}", ports, reports.append)
    with pytest.raises(ServiceError) as error, service:
        service.wait_ready(timeout=12)
    assert str(error.value).splitlines()[1:] == [
        "the prefill server does not answer its health check",
        "the decode server does not answer its health check",
        f"last answer of http://127.0.0.1:{port}: HTTP 503 {{}}",
        "prefill.log: ValueError: no room for the model: use --max-total-tokens",
        "decode.log: up",
    ]
    assert reports and reports[-1].endswith("; HTTP 503 {}")


def test_the_error_of_a_server_that_has_ended_is_shown_wherever_it_stands(tmp_path: Path, port: int) -> None:
    group = ProcessGroup("prefill server", [sys.executable, "-c", FAILING, "0"], tmp_path / "prefill.log")
    service = LocalService([group], f"http://127.0.0.1:{port}", {})
    with pytest.raises(ServiceError, match=r"ended with status 0; .*\nline 10\n") as error, service:
        service.wait_ready(timeout=20)
    assert "before them: ValueError: no room for the model: use --max-total-tokens" in str(error.value)
    assert "secret" not in str(error.value)


def test_not_ready_in_time_names_the_logs(tmp_path: Path, port: int) -> None:
    service = LocalService([ProcessGroup("server", SLEEPER, tmp_path / "server.log")], f"http://127.0.0.1:{port}", {})
    with pytest.raises(ServiceError, match=f"not ready after 1 s; logs: {tmp_path}"), service:
        service.wait_ready(timeout=1)
    assert service.groups[0].exit_status is not None


def test_a_port_in_use_is_named(port: int) -> None:
    with _listening(port), pytest.raises(CommandError, match=f"port {port} for the prefill server is not free"):
        check_ports({"prefill server": port})


def test_a_port_beyond_the_last_one_is_refused() -> None:
    with pytest.raises(CommandError, match="port 65536 for the decode server does not exist"):
        check_ports({"router": 65535, "decode server": 65536})


@pytest.mark.parametrize("offset", range(7))
def test_launch_refuses_every_taken_port_of_a_cluster(tmp_path: Path, port: int, offset: int) -> None:
    cluster = LocalCluster("no-model", port=port, log_dir=tmp_path)
    with _listening(port + offset), pytest.raises(CommandError, match=f"port {port + offset} for the"):
        cluster.start()
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_the_script_reports_a_port_in_use(tmp_path: Path, port: int) -> None:
    with _listening(port):
        result = subprocess.run(
            [ROOT / "launch/pd_local.sh", "--model", "none", "--port", str(port), "--log-dir", tmp_path],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 1
    assert f"port {port} for the router is not free" in result.stderr and "READY" not in result.stdout


def test_arguments_reach_the_right_server(tmp_path: Path) -> None:
    cluster = LocalCluster(
        "some-model",
        port=31990,
        log_dir=tmp_path,
        sp_size=3,
        arguments=["--dtype", "float32"],
        prefill_arguments=["--prefill-only"],
        decode_arguments=["--decode-only"],
    )
    prefill, decode, router = (" ".join(group.command) for group in cluster.groups)
    assert "--prefill-backend apb --sp-size 3" in prefill and "--prefill-backend" not in decode
    assert "--disaggregation-mode prefill --disaggregation-transfer-backend zmq" in prefill
    assert "--disaggregation-mode decode --disaggregation-transfer-backend zmq" in decode
    assert prefill.endswith("--dtype float32 --prefill-only") and decode.endswith("--dtype float32 --decode-only")
    assert "--prefill http://127.0.0.1:31991 31993 --decode http://127.0.0.1:31992" in router
    assert "--port 31990" in router and cluster.url == "http://127.0.0.1:31990"


def test_replicas_of_a_decode_server_find_their_ports(tmp_path: Path) -> None:
    """With one given to all of them, the second could not listen."""
    for replicas in (["--dp-size", "2"], ["--dp=2"], ["--data-parallel-size=2"]):
        cluster = LocalCluster("some-model", port=31990, log_dir=tmp_path, decode_arguments=replicas)
        prefill, decode, _ = (group.command for group in cluster.groups)
        assert "--nccl-port" in prefill and "--nccl-port" not in decode
    alone = LocalCluster("some-model", port=31990, log_dir=tmp_path, decode_arguments=["--dp-size", "1"])
    assert "--nccl-port" in alone.groups[1].command


def test_the_command_line_reaches_both_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: list[LocalCluster] = []
    monkeypatch.setattr(launch, "serve", lambda cluster, timeout: clusters.append(cluster) or 0)
    options = ["--model", "m", "--port", "31990", "--log-dir", str(tmp_path), "--sp-size", "3"]
    one_side = ["--prefill-args", "--one", "--decode-args", "--two 'a b'"]
    assert cli.main(["launch", *options, *one_side, "--", "--prefill-args", "both"]) == 0
    prefill, decode, _ = (group.command for group in clusters[0].groups)
    assert prefill[-3:] == ("--prefill-args", "both", "--one")
    assert decode[-4:] == ("--prefill-args", "both", "--two", "a b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sp-size", "0"], "--sp-size must be at least 1, not 0"),
        (["--sp-size", "2", "--prefill-backend", "none"], "--sp-size 2 needs --prefill-backend apb"),
    ],
)
def test_launch_refuses_bad_rank_counts(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--model", "m", *options]) == 1
    assert message in capsys.readouterr().err


def test_stock_prefill_gets_no_option_of_ours(tmp_path: Path) -> None:
    cluster = LocalCluster("m", port=31990, log_dir=tmp_path, sp_size=1, prefill_backend=None)
    assert not {"--prefill-backend", "--sp-size"} & set(cluster.groups[0].command)


@pytest.mark.parametrize(
    ("num_gpus", "sp_size", "decode", "in_turn"),
    [
        (0, 2, (), False),
        (3, 2, ("--base-gpu-id", "2"), False),
        (2, 2, ("--mem-fraction-static", "0.6"), True),
        (1, 1, ("--mem-fraction-static", "0.6"), True),
    ],
)
def test_decode_takes_the_next_gpu_or_shares_the_first(
    num_gpus: int, sp_size: int, decode: tuple[str, ...], in_turn: bool
) -> None:
    placement = place(num_gpus, sp_size)
    assert (placement.decode, placement.in_turn) == (decode, in_turn)
    assert bool(placement.prefill) == in_turn


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], None), (["--api-key"], None), (["--api-key", "a", "--api-key=b"], "b"), (["-x", "--api-key", "a"], "a")],
)
def test_the_value_of_an_option(arguments: list[str], value: str | None) -> None:
    assert value_of("--api-key", arguments) == value
