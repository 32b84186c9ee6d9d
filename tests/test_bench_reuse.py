"""`sglang-apb bench reuse`: what is asked again, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FLOAT32, next_port, thorough
from test_bench import PretendedServers, run_pretended

from sglang_apb import cli

SIZES = ["--document", "300", "--questions", "3", "--question-tokens", "20", "--chat", "100,200", "--turns", "3"]


def with_cache(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 200, {"meta_info": {"finish_reason": {"type": "length"}, "cached_tokens": 280, "prefill": {}}}


@pytest.fixture
def reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, PretendedServers]]:
    def run(behaviour: dict[str, Any], *options: str) -> tuple[int, PretendedServers]:
        return run_pretended("reuse", behaviour, [*SIZES, *options], tmp_path, monkeypatch)

    return run


def test_documents_share_their_beginning_and_turns_are_beginnings(
    reuse: Callable[..., tuple[int, PretendedServers]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "reuse.json", tmp_path / "reuse.png"
    status, servers = reuse({"one": with_cache, "apb": with_cache}, "--output", str(output), "--plot", str(plot))
    assert status == 0
    one, apb = ([body["input_ids"] for body in servers.asked[name]] for name in ("one", "apb"))
    assert one == apb
    warm_up, *document = one[:4]
    assert all(prompt[:280] == document[0][:280] and len(prompt) == 300 for prompt in document)
    assert len({tuple(prompt[280:]) for prompt in document}) == 3 and warm_up[:8] != document[0][:8]
    assert [len(turn) for turn in one[4:]] == [100, 150, 200]
    assert all(turn == one[-1][: len(turn)] for turn in one[4:])
    printed = capsys.readouterr().out
    assert printed.count("| all ") == 2 and " 280 |" in printed and "best plain / apb" in printed
    result = json.loads(output.read_text())
    assert len(result["results"]) == 12 and result["results"][0]["cached_tokens"] == 280
    assert result["settings"]["turns"] == 3 and plot.stat().st_size > 5000


def test_a_server_that_ends_keeps_what_was_timed(
    reuse: Callable[..., tuple[int, PretendedServers]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def dies(body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        asked.append(1)
        return with_cache(body) if len(asked) < 4 else None

    status, _ = reuse({"one": dies, "apb": with_cache})
    printed = capsys.readouterr().out
    assert status == 0 and "- one: the server ended with status 137: out of memory" in printed
    assert printed.count("| all ") == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--question-tokens", "300"], "--question-tokens 300 leaves nothing of --document 300"),
        (["--chat", "100"], "--chat takes the tokens of the first and of the last turn"),
    ],
)
def test_sizes_that_say_nothing_are_refused(
    options: list[str],
    sentence: str,
    reuse: Callable[..., tuple[int, PretendedServers]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reuse({}, *options)[0] == 1
    assert sentence in capsys.readouterr().err


@thorough
@pytest.mark.server
def test_real_servers_find_the_document_again(smollm2: Path, tmp_path: Path) -> None:
    output = tmp_path / "reuse.json"
    settings = ["--prefill-backend-config", '{"block": 64, "anchor": 32, "passing": 8, "min_tokens": 64}']
    command = ["bench", "reuse", "--model", str(smollm2), "--backends", "", *SIZES, *settings]
    command += ["--port", str(next_port()), "--log-dir", str(tmp_path), "--output", str(output), "--", *FLOAT32]
    assert cli.main(command) == 0
    found = [each["cached_tokens"] for each in json.loads(output.read_text())["results"]]
    assert found == [0, 225, 225, 0, 75, 113], "contexts: all but the last quarter, of 300, 100 and 150 tokens"
