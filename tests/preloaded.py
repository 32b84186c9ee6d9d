"""Python programs in processes of their own, in which SGLang is imported already: that takes longer than they do."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sglang.srt.server_args", "sglang.srt.managers.scheduler", "sglang.launch_server"])


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `python -c code ARGUMENTS` would, with what is added to the environment."""
    with tempfile.TemporaryDirectory() as folder:
        process = _CONTEXT.Process(target=_run, args=(folder, code, arguments, dict(os.environ | environment)))
        process.start()
        process.join(300)
        assert process.exitcode is not None, f"{arguments} did not end within 300 s"
        said = [(Path(folder) / name).read_text() for name in ("1", "2")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _run(folder: str, code: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    for number in (1, 2):
        os.dup2(os.open(Path(folder) / str(number), os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
