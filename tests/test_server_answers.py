"""With default settings a fact in a long prompt is found as with exact attention, through a whole cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import next_port, running

from sglang_apb.commands.eval.needles import build_prompts
from sglang_apb.commands.report import prefill_report
from sglang_apb.commands.servers import LocalCluster

pytestmark = pytest.mark.server
LENGTH, NUM_PROMPTS = 3072, 2


def complete(url: str, text: str, **fields: Any) -> Any:
    body = {"model": "default", "prompt": text, "max_tokens": 12, "temperature": 0}
    response = requests.post(f"{url}/v1/completions", json=body | fields, timeout=600)
    assert response.ok, response.text[:1000]
    return response.json()


def test_needles_are_found_as_often_as_by_exact_attention(smollm2: Path, log_dirs: Iterator[Path]) -> None:
    """bf16 and nothing configured, as a user would start it; `sglang-apb eval needles` asks more and longer ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = build_prompts(LENGTH, NUM_PROMPTS, 0, lambda text: len(tokenizer(text).input_ids))
    exact = {"custom_params": {"prefill": {"exact": True}}}
    found = {"apb": 0, "exact": 0}
    with running(LocalCluster(str(smollm2), port=next_port(), log_dir=next(log_dirs), sp_size=2)) as url:
        for prompt in asked:
            for method, wish in (("apb", {}), ("exact", exact)):
                answer = complete(url, prompt.text, **wish)
                report = prefill_report(answer)
                assert report["method"] == method
                assert method == "exact" or report["attention_share"] < 0.75, "nothing was saved"
                found[method] += prompt.number in answer["choices"][0]["text"]
    assert found["exact"] > 0, "exact attention finds none, so nothing was tested"
    assert found["apb"] >= found["exact"]
