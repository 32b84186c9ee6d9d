"""No question is so long that it exhausts a GPU: what does not fit beside its prompt is refused, and the rest runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import torch
from conftest import next_port

from sglang_apb.commands.bench.models import SHAPES, shape_folder
from sglang_apb.commands.bench.servers import BenchServer, plan_servers
from sglang_apb.commands.bench.timed_prompts import random_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = "llama-3.1-8b"
NUM_TOKENS = 100_000
QUESTIONS = (256, *range(10_000, NUM_TOKENS, 10_000))


def ask(url: str, question_tokens: int) -> requests.Response:
    prompt = random_prompt(0, NUM_TOKENS, question_tokens, SHAPES[SHAPE]["vocab_size"])
    custom = {"prefill": {"question_tokens": question_tokens}}
    sampling = {"max_new_tokens": 1, "ignore_eos": True, "custom_params": custom}
    return requests.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=300)


@pytest.mark.timeout(600)
def test_questions_of_every_length_beside_a_large_pool(tmp_path: Path) -> None:
    """A pool that is told to take more of the GPU than ours would leaves little for activations."""
    plan = plan_servers(["flashinfer"], gpus=1, dummy_weights=True, extra=("--mem-fraction-static", "0.91"))[-1]
    with shape_folder(SHAPE) as model:
        server = BenchServer(model, port=next_port(), log_dir=tmp_path, arguments=plan.arguments)
        with server:
            server.wait_ready(timeout=500)
            answers = {question_tokens: ask(server.url, question_tokens) for question_tokens in QUESTIONS}
            again = ask(server.url, QUESTIONS[0])
    said = {number: "runs" if answer.ok else answer.json()["error"]["message"] for number, answer in answers.items()}
    print("\n".join(f"question of {number}: {text}" for number, text in said.items()))
    assert answers[QUESTIONS[0]].ok and again.ok, said
    for answer in answers.values():
        assert answer.ok or answer.status_code == requests.codes.bad_request, said
        assert answer.ok or "fewer question_tokens" in answer.text, said
    assert not answers[QUESTIONS[-1]].ok, said
