"""`sglang-apb eval` with real servers, which it starts itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FLOAT32, Plain, next_port, running, server

from sglang_apb import cli
from sglang_apb.commands.eval import prompts
from sglang_apb.commands.report import prefill_report

pytestmark = pytest.mark.server


def texts(path: Path) -> list[str]:
    return sorted(json.loads(line)["text"] for line in path.read_text().splitlines()[1:])


def test_ruler_of_two_tasks(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks that are handed on whole give exact attention's answers, found in the prefix cache or not."""
    whole = {"min_tokens": 0, "question_tokens": 64, "block": 240, "passing": "all"}
    options = ["--tasks", "niah_single_1,vt", "--lengths", "1024", "--num-samples", "2", "--at-once", "2"]
    options += [
        "--twice",
        "--config",
        f"whole={json.dumps(whole)}",
        "--output",
        str(tmp_path),
        "--port",
        str(next_port()),
    ]
    assert cli.main(["eval", "ruler", "--model", str(smollm2), *options, "--", *FLOAT32]) == 0
    print(capsys.readouterr().out)
    found = [
        json.loads(line)["num_cached"] for line in (tmp_path / "answers" / "whole.jsonl").read_text().splitlines()[1:]
    ]
    assert min(found) > 600, "the second time the context is there"
    answers = {name: texts(tmp_path / "answers" / f"{name}.jsonl") for name in ("exact", "whole")}
    assert len(answers["exact"]) == 4
    assert (tmp_path / "answers" / "whole.jsonl").read_text().count('"method": "apb"') == 4
    assert answers["whole"] == answers["exact"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert {(row["contestant"], row["length"]) for row in result["costs"]} == {("exact", 1024), ("whole", 1024)}
    assert {row["task"] for row in result["scores"]} == {"niah_single_1", "vt", None}


def test_own_prompts(plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "prompts.jsonl", "All human beings are born free and equal in dignity and rights. " * 40
    chat = [{"role": "user", "content": text}]
    file.write_text(json.dumps({"prompt": text}) + "\n" + json.dumps({"messages": chat, "answer": "no such answer"}))
    whole = {"min_tokens": 0, "question_tokens": 64, "block": 128, "anchor": 0, "passing": 128}
    options = ["--config", f"whole={json.dumps(whole)}", "--output", str(tmp_path / "out"), "--port", str(next_port())]
    options += ["--max-tokens", "8", "--model", str(plain.model)]
    assert cli.main(["eval", "prompts", str(file), *options, "--", *FLOAT32]) == 0
    output = capsys.readouterr().out
    assert "whole: 2 of 2 answers are exact attention's; its tokens' log-probabilities change by " in output
    assert output.count("0 of 1 are right, 0 with exact attention: turn it on for these prompts.") == 1
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["prompts"]
    assert all(abs(row["logprob_sparse"] - row["logprob_exact"]) < 1e-3 for row in rows) and len(rows) == 2
    assert (tmp_path / "out" / "answers" / "whole.jsonl").read_text().count('"method": "apb"') == 2


def test_an_answer_is_as_likely_as_when_it_was_decoded(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """Its tokens stand in the question, whose rows see what decoded tokens see; exact attention has others."""
    lossy = {"min_tokens": 0, "block": 128, "anchor": 32, "passing": 4, "question_tokens": 64}
    apb = ("--prefill-backend", "apb", "--sp-size", "2", "--prefill-backend-config", json.dumps(lossy))
    prompt = plain.prompts[1000]
    with running(server(plain.model, next(log_dirs), *apb)) as url:
        decoded = prompts._generate(url, prompt, 12, return_logprob=True)
        own = decoded["meta_info"]["output_token_logprobs"]
        tokens, report = [entry[1] for entry in own], prefill_report(decoded)
        found = prompts.logprobs_of(url, prompt, tokens, report)
        custom = {"prefill": {"exact": True}}
        body = prompts._generate(
            url, prompt + tokens, 1, custom, return_logprob=True, logprob_start_len=len(prompt) - 1
        )
        exact = [entry[0] for entry in body["meta_info"]["input_token_logprobs"][1:]]
        assert prompts.logprobs_of(url, prompt, tokens, report | {"selector": "query"}) is None
        assert prompts.logprobs_of(url, prompt, tokens, report | {"anchor": 64}) is None
    assert report["method"] == "apb" and report["attention_share"] < 0.6
    assert found is not None and found == pytest.approx([entry[0] for entry in own], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) > 0.01
