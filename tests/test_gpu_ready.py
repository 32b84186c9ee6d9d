"""A GPU server that says it is ready has built what a sparse prompt needs: nothing is compiled while one waits.

What Triton, FlashInfer and SGLang's own kernels compile is counted by the files that they leave. Triton starts with an
empty cache; the others' take minutes to fill, and are those of other servers.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests
import torch
from conftest import next_port
from sglang.srt.environ import envs

from sglang_apb.commands.bench.models import SHAPES, shape_folder
from sglang_apb.commands.bench.servers import BenchServer, plan_servers
from sglang_apb.commands.bench.timed_prompts import random_prompt
from sglang_apb.config import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Prompts on either side of what changes a call: blocks together and alone, parts of the question's keys, odd lengths.
LENGTHS = (2048, 3001, 8192, 12288, 12345, 20001, 32768, 50003, 131072)
QUESTIONS = (1, 7, 130, 300, 2000)
COMPILED = ("*.so", "*.cubin")


def compiled(triton_cache: Path) -> set[Path]:
    sglangs = Path(envs.SGLANG_CACHE_DIR.get()).expanduser()
    caches = [
        triton_cache,
        Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", sglangs)) / ".cache" / "flashinfer",
        Path(envs.SGLANG_JIT_CACHE_DIR.get() or Path.home() / ".cache" / "sglang" / "jit"),
    ]
    return {path for cache in caches for pattern in COMPILED for path in cache.rglob(pattern)}


def ask(url: str, prompt: list[int], question_tokens: int | None = None) -> str:
    wish = {} if question_tokens is None else {"prefill": {"question_tokens": question_tokens}}
    sampling = {"max_new_tokens": 1, "ignore_eos": True, "custom_params": wish}
    response = requests.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=600)
    assert response.ok, response.text[:500]
    return str(response.json()["meta_info"]["prefill"]["method"])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nothing_is_compiled_once_the_server_is_ready(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    vocabulary = SHAPES["llama-3.1-8b"]["vocab_size"]
    # Exact prompts are SGLang's: it compiles a copy for its CUDA graphs when the first of them comes.
    lengths = [length for length in LENGTHS if length >= parse(None).shortest_sparse("cuda", num_ranks)]
    plan = plan_servers(["flashinfer"], gpus=num_ranks, dummy_weights=True)[-1]
    with shape_folder("llama-3.1-8b") as model:
        server = BenchServer(model, port=next_port(), log_dir=tmp_path, arguments=plan.arguments)
        with server:
            server.wait_ready(timeout=900)
            before = compiled(tmp_path / "triton")
            assert before, "no compiled file is found at all"
            methods = {ask(server.url, random_prompt(0, length, 0, vocabulary)) for length in lengths}
            document = random_prompt(2, 30001, 0, vocabulary)  # found again from the midst of a block on
            methods |= {ask(server.url, document[:length]) for length in (20_000, 30_001)}
            for question_tokens in QUESTIONS:
                methods.add(ask(server.url, random_prompt(1, 20000, question_tokens, vocabulary), question_tokens))
            after = compiled(tmp_path / "triton")
    log = (tmp_path / "server.log").read_text()
    assert "Building sparse attention, 1 of " in log and "Sparse attention is ready" in log
    assert methods == {"apb"}
    assert not after - before, sorted(path.name for path in after - before)
