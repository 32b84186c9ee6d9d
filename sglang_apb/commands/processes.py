"""A command with everything it starts, as one thing that ends as a whole.

`ProcessGroup` starts a small guard process, and the guard starts the command. The guard's standard input is
a pipe that only the starting process holds: when that process stops the group, or dies in any way at all, the
pipe closes, and the guard ends every descendant and removes what they left in /tmp and /dev/shm.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

_TERM_GRACE_S = 1.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05
_SCAN_INTERVAL_S = 2.0
_SHARED_MEMORY = "/dev/shm"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINE_WIDTH = 300
# How Python, argparse, and SGLang's router name an error.
_ERROR = re.compile(r"\b(?:[A-Z]\w*(?:Error|Exception)|ERROR|CRITICAL)\b|\berror: ")
# SGLang's line of all its options, keys among them.
_ALL_OPTIONS = "server_args="
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class ProcessGroup:
    """One command, its descendants and its log file."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None):
        """`env` is added to this process's environment."""
        self.name = name
        self.command = tuple(command)
        self.log_path = log_path
        self._env = dict(env or {})
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "sglang_apb.commands.processes", "--", *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | self._env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Of the guard, whose descendants are the command and all that it started; None before `start`."""
        return self._guard.pid if self._guard else None

    @property
    def exit_status(self) -> int | None:
        """The command's exit status, 128 + n after signal n; None while it runs or before `start`."""
        return self._guard.poll() if self._guard else None

    def request_stop(self) -> None:
        """Begins what `stop` waits for."""
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            # A process forked from this one may hold the pipe too.
            self._guard.terminate()

    def stop(self) -> None:
        """Returns when every descendant is gone. Stopping twice, or before `start`, is a no-op."""
        self.request_stop()
        if self._guard:
            self._guard.wait(timeout=_STOP_TIMEOUT_S)

    def log_tail(self, num_lines: int = 20) -> str:
        """`log_lines` as one text."""
        return "\n".join(self.log_lines(num_lines))

    def log_lines(self, num_lines: int) -> list[str]:
        """The log's last lines that are not empty, each cut, without colours."""
        return self._lines()[-num_lines:]

    def log_errors(self, num_lines: int = 5) -> list[str]:
        """The log's last lines that name an error, each of them once."""
        return list(dict.fromkeys(line for line in self._lines() if _ERROR.search(line)))[-num_lines:]

    def _lines(self) -> list[str]:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        lines = (line for line in _COLOUR.sub("", text).splitlines() if line.strip() and _ALL_OPTIONS not in line)
        return [line[:_LINE_WIDTH] for line in lines]


def run_guarded(command: Sequence[str]) -> int:
    """Runs `command` until it ends, standard input closes, or a signal comes.

    Returns the command's exit status as a shell would.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    received: list[int] = []
    signals = _note_signals(received)
    temporary = tempfile.mkdtemp(prefix="sglang-apb-")
    shared_memory: set[int] = set()
    child = None
    try:
        child = _start(command, temporary)
        _wait(child, signals, shared_memory)
    finally:
        _on_signals(signal.SIG_IGN)
        shared_memory |= _mapped_shared_memory()
        _end_descendants(child)
        _remove_shared_memory(shared_memory)
        shutil.rmtree(temporary, ignore_errors=True)
    if received:
        return 128 + received[0]
    status = child.wait()
    return status if status >= 0 else 128 - status


def _note_signals(received: list[int]) -> int:
    """A file that is readable once a signal has come, whose number is then in `received`. A handler that raised could
    do so while this process cleans up: whoever stops it closes its standard input first.
    """
    readable, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(written)
    _on_signals(lambda number, _: received.append(number))
    return readable


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def _start(command: Sequence[str], temporary: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": temporary, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        # Only for a guard that is itself killed by SIGKILL; this process has one thread, so a hook is safe.
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def _wait(child: subprocess.Popen[bytes], signals: int, shared_memory: set[int]) -> None:
    """Returns when the child has ended, standard input is closed, or a signal has come.

    Shared memory is collected all along: after a crash, the processes that could tell are gone.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(os.pidfd_open(child.pid), selectors.EVENT_READ)
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(signals, selectors.EVENT_READ)
        while not selector.select(timeout=_SCAN_INTERVAL_S):
            shared_memory |= _mapped_shared_memory()


def _mapped_shared_memory() -> set[int]:
    """Inodes of files in /dev/shm that a descendant has mapped.

    Not paths: a named semaphore is mapped under a temporary name, before it gets its own.
    """
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:  # ended meanwhile
            continue
        found |= {int(line.split()[4]) for line in maps.splitlines() if f" {_SHARED_MEMORY}/" in line}
    return found


def _remove_shared_memory(inodes: set[int]) -> None:
    for entry in os.scandir(_SHARED_MEMORY):
        if entry.inode() in inodes:
            Path(entry.path).unlink(missing_ok=True)


def _end_descendants(child: subprocess.Popen[bytes] | None) -> None:
    """Asks the command to end, then kills all that is still there. Leaves zombies to their parents."""
    deadline = time.monotonic() + _TERM_GRACE_S
    if child and child.poll() is None:
        child.terminate()
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    # Again and again: a process may start another one while it is being killed.
    while descendants := _living_descendants():
        for process in descendants:
            _kill(process)
        time.sleep(_POLL_S)


def _living_descendants() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if _is_alive(child)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs a command and ends its whole process tree with stdin.")
    parser.add_argument("command", nargs="+")
    sys.exit(run_guarded(parser.parse_args().command))
