"""`sglang-apb eval` with real servers, which it starts itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import FLOAT32, next_port

from sglang_apb import cli

pytestmark = pytest.mark.server


def texts(path: Path) -> list[str]:
    return sorted(json.loads(line)["text"] for line in path.read_text().splitlines()[1:])


def test_ruler_of_two_tasks(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks that are handed on whole give exact attention's answers."""
    whole = {"min_tokens": 0, "question_tokens": 64, "num_blocks": 4, "passing": "all"}
    options = ["--tasks", "niah_single_1,vt", "--lengths", "1024", "--num-samples", "2", "--at-once", "2"]
    options += ["--config", f"whole={json.dumps(whole)}", "--output", str(tmp_path), "--port", str(next_port())]
    assert cli.main(["eval", "ruler", "--model", str(smollm2), *options, "--", *FLOAT32]) == 0
    print(capsys.readouterr().out)
    answers = {name: texts(tmp_path / "answers" / f"{name}.jsonl") for name in ("exact", "whole")}
    assert len(answers["exact"]) == 4
    assert (tmp_path / "answers" / "whole.jsonl").read_text().count('"method": "apb"') == 4
    assert answers["whole"] == answers["exact"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert {(row["contestant"], row["length"]) for row in result["costs"]} == {("exact", 1024), ("whole", 1024)}
    assert {row["task"] for row in result["scores"]} == {"niah_single_1", "vt", None}
