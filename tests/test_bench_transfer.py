"""`sglang-apb bench transfer` on a small prompt: every way really moves the bytes, and the table compares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_apb import cli
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import transfer, transfer_peers
from sglang_apb.commands.bench.transfer_prompts import RAW, Prompt, Time

SMALL = Prompt("small, 300 tokens", num_buffers=4, item_len=64, num_tokens=300)


def test_every_way_moves_the_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(transfer.PROMPTS, "smollm2", SMALL)
    output = tmp_path / "transfer.json"
    assert cli.main(["bench", "transfer", "--prompts", "smollm2", "--repeats", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    ways = {row["way"]: row for row in result["results"]}
    expected = {transfer_peers.COPY, RAW, transfer_peers.OVER_ZMQ, transfer_peers.SCATTERED, transfer_peers.CURVE}
    assert expected <= ways.keys()
    assert transfer_peers.MOONCAKE in ways or transfer_peers.MOONCAKE in result["notes"][0]
    assert all(row["num_bytes"] == 4 * 64 * 300 and len(row["seconds"]) == 3 * 2 for row in ways.values())
    assert "| of raw TCP socket |" in capsys.readouterr().out


def test_bytes_that_have_not_arrived_are_an_error() -> None:
    pool = transfer_peers.Pool(SMALL, 1)
    pool.buffers[2][77] ^= 1
    with pytest.raises(CommandError, match="buffer 2 has not arrived whole"):
        pool.check(1)


def test_rates_by_hand() -> None:
    times = [Time("p", RAW, 4 * 10**9, [2.0, 1.0, 9.0]), Time("p", "zmq", 4 * 10**9, [4.0])]
    assert [time.gb_per_s for time in times] == [2.0, 1.0]
    assert transfer.describe(times).splitlines()[-1].endswith("0.50 |")
