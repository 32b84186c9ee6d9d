"""What is told of transfers, and the dashboard that shows it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_apb.metrics import METRICS, PREFIX
from sglang_apb.transfer import observer
from sglang_apb.transfer.observer import Cause, Observer

DASHBOARD = Path(__file__).parents[1] / "launch" / "grafana.json"


def test_every_metric_is_on_the_dashboard_and_no_other() -> None:
    text = DASHBOARD.read_text()
    shown = set(re.findall(rf"{PREFIX}(\w+?)(?:_total|_bucket|_sum|_count)?(?=[\[{{)\s\"]|\\)", text))
    assert shown == METRICS.keys()
    panels = json.loads(text)["panels"]
    assert all(panel["targets"] for panel in panels) and len({panel["id"] for panel in panels}) == len(panels)


def test_each_metric_counts_what_it_says(tmp_path: Path) -> None:
    """In a process of its own, with several processes' values added up as SGLang does."""
    program = """
from sglang_apb import metrics
from sglang_apb.transfer.observer import Cause, Observer
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
seen = Observer("decode", with_metrics=True)
seen.ended(1, 1000, 600, 0.03)
seen.ended(2, 500, 0, 2.0)
seen.failed(3, Cause.LOST, "x")
seen.refused_frame("y", "z")
seen.has_peers(3)
metrics.count_prefills("apb", 4)
Observer("prefill").ended(1, 10**9, 0, 1.0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    values = dict(line.rsplit(" ", 1) for line in run.stdout.splitlines() if not line.startswith("#") and line)
    expected = {
        'kv_bytes_total{side="decode"}': 1500,
        'kv_hidden_bytes_total{side="decode"}': 600,
        'kv_transfer_seconds_count{side="decode"}': 2,
        'kv_transfer_seconds_bucket{le="0.05",side="decode"}': 1,
        'kv_transfer_failures_total{cause="peer lost",side="decode"}': 1,
        'kv_frames_refused_total{side="decode"}': 1,
        'kv_peers{side="decode"}': 3,
        'prefill_requests_total{path="apb"}': 4,
    }
    assert {name: float(values[PREFIX + name]) for name in expected} == expected
    assert not any('side="prefill"' in name for name in values), "without --enable-metrics nothing is counted"


def test_a_flood_of_bad_frames_does_not_flood_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(observer.time, "monotonic", lambda: now)
    seen = Observer("prefill")
    for _ in range(1000):
        seen.refused_frame("a peer", "magic")
    now += observer.WARN_EVERY_S
    seen.refused_frame("a peer", "length")
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "KV transfer: dropped a frame from a peer: magic",
        "KV transfer: dropped a frame from a peer: length (999 more since the last such line)",
    ]


def test_a_line_for_each_request_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, observer.logger.name)
    Observer("prefill").ended(7, 1000, 250, 0.5)
    Observer("prefill").failed(8, Cause.TIMEOUT, "No answer.")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "KV transfer: room 7: 1000 bytes in 0.500 s, 25% of them during prefill"
    assert told[1] == "KV transfer: room 8 failed (timeout): No answer."
