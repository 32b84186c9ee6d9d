"""`sglang-apb bench mixed`: who is asked what and when, and what is said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FLOAT32, next_port, thorough
from test_bench import PretendedServers, run_pretended

from sglang_apb import cli
from sglang_apb.commands.bench.load import Streamed, between_tokens, first_token

SIZES = ["--long-prompt", "500", "--beside-rate", "10", "--long-prompts", "100,200,300", "--rate", "20"]
SIZES += ["--short-prompt", "20", "--output-tokens", "3"]
ANSWERED = 200, {"meta_info": {"finish_reason": {"type": "length"}}}
Mixed = Callable[..., tuple[int, PretendedServers]]


def at_once(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if len(body["input_ids"]) == 500:
        time.sleep(1)
    return ANSWERED


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixed:
    def run(behaviour: dict[str, Any], *options: str) -> tuple[int, PretendedServers]:
        return run_pretended("mixed", behaviour, [*SIZES, *options], tmp_path, monkeypatch)

    return run


def test_short_prompts_are_asked_while_the_long_one_runs(mixed: Mixed, tmp_path: Path) -> None:
    output, plot = tmp_path / "mixed.json", tmp_path / "mixed.png"
    status, servers = mixed({"apb": at_once}, "--loads", "beside", "--output", str(output), "--plot", str(plot))
    assert status == 0
    short_warm_up, long_warm_up, *asked = (body["input_ids"] for body in servers.asked["apb"])
    assert (len(short_warm_up), len(long_warm_up)) == (20, 300)
    assert sorted(map(len, asked))[-1] == 500 and 5 <= sorted(map(len, asked)).count(20) <= 12
    assert len({tuple(prompt[:8]) for prompt in asked}) == len(asked), "nothing to find in a cache"
    result = json.loads(output.read_text())
    (long,) = (each for each in result["results"] if each["kind"] == "long")
    shorts = [each for each in result["results"] if each["kind"] == "short"]
    assert 1 <= long["first"] < 3 and all(each["first"] < 0.5 for each in shorts)
    assert max(each["asked"] for each in shorts) <= long["first"] and plot.stat().st_size > 5000
    assert [reason for reason in result["reasons"] if "- one: " in reason], "its server did not start"


def test_each_long_prompt_is_followed_by_another_one(mixed: Mixed, capsys: pytest.CaptureFixture[str]) -> None:
    def late(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(0.3 if len(body["input_ids"]) > 20 or body["input_ids"][0] % 2 else 0)
        return ANSWERED

    behaviour = {"one": late, "one-shortest-first": late, "apb": at_once}
    status, servers = mixed(behaviour, "--loads", "crowd", "--seconds", "2", "--deadline", "0.2")
    assert status == 0
    for asked in servers.asked.values():
        lengths = [len(body["input_ids"]) for body in asked[2:]]
        assert 35 <= lengths.count(20) <= 40 and all(lengths.count(length) >= 3 for length in (100, 200, 300))
        assert set(lengths) == {20, 100, 200, 300}
    printed = capsys.readouterr().out
    assert "within 0.2 s" in printed and "one-shortest-first" in printed
    ratio = float(printed.split("apb / best plain: ")[1].split("x")[0])
    assert ratio > 1.5, "of theirs, half of the short ones come in time, and no long one"


def test_what_is_refused_is_said_and_has_no_first_token(mixed: Mixed, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if len(body["input_ids"]) == 200:
            return 400, {"error": {"message": "not of this length"}}
        return None if len(body["input_ids"]) == 100 else ANSWERED

    status, servers = mixed({"apb": refuses}, "--loads", "crowd", "--seconds", "1")
    assert status == 0
    lengths = [len(body["input_ids"]) for body in servers.asked["apb"]]
    assert lengths.count(200) == 1 and lengths.count(100) == 1, "a server is not asked again what it refused"
    printed = capsys.readouterr().out
    assert "- apb, crowd: HTTP 400" in printed and "- apb, crowd: no answer" in printed


def test_the_load_ends_with_its_time(mixed: Mixed) -> None:
    def never(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(0 if len(body["input_ids"]) == 300 or not body.get("stream") else 30)
        return ANSWERED

    started = time.monotonic()
    assert mixed({"apb": never}, "--beside-seconds", "1", "--seconds", "1", "--deadline", "1")[0] == 0
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rate", "0"], "--rate, --beside-rate and --deadline must be above 0"),
        (["--loads", "crowds"], "'crowds' is none of beside, crowd"),
    ],
)
def test_loads_that_are_none_are_refused(
    options: list[str], sentence: str, mixed: Mixed, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert mixed({}, *options)[0] == 1
    except SystemExit as end:
        assert end.code == 2
    assert sentence in capsys.readouterr().err


def test_whoever_has_no_first_token_counts_as_late() -> None:
    ones = [Streamed("short", 8, 0, first=time_, waited=time_) for time_ in (0.1, 0.2, 0.3)]
    ones.append(Streamed("short", 8, 0, waited=4.0))
    assert str(first_token(ones, 0.5)) == "0.20 s" and str(first_token(ones, 0.95)) == "> 4.00 s"
    assert first_token([], 0.5) is None
    assert [one.within(0.2) for one in ones] == [True, True, False, False]


def test_times_between_tokens_are_of_all_answers() -> None:
    ones = [Streamed("short", 8, 0, between=[0.1, 0.1]), Streamed("short", 8, 0, between=[0.3])]
    assert between_tokens(ones, 0.5) == pytest.approx(0.1) and 0.25 < (between_tokens(ones, 0.95) or 0) <= 0.3
    assert between_tokens([Streamed("short", 8, 0)], 0.5) is None


@thorough
@pytest.mark.server
def test_real_servers_let_short_prompts_in_between(smollm2: Path, tmp_path: Path) -> None:
    output = tmp_path / "mixed.json"
    settings = {"block": 64, "anchor": 32, "passing": 8, "min_tokens": 200, "round_tokens": 256, "between_rounds": 256}
    command = ["bench", "mixed", "--model", str(smollm2), "--backends", "", *SIZES, "--long-prompt", "5000"]
    command += ["--seconds", "3", "--rate", "2", "--beside-rate", "2", "--prefill-backend-config", json.dumps(settings)]
    command += ["--port", str(next_port()), "--log-dir", str(tmp_path), "--output", str(output), "--", *FLOAT32]
    assert cli.main(command) == 0
    results = json.loads(output.read_text())["results"]
    beside = [each for each in results if each["load"] == "beside"]
    (long,) = (each for each in beside if each["kind"] == "long")
    shorts = [each for each in beside if each["kind"] == "short" and each["asked"] > 0]
    assert shorts and any(each["asked"] + each["first"] < long["first"] for each in shorts)
    assert all(each["reason"] is None for each in results)
