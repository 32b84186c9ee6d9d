"""Real servers on GPUs, prefill on one or two and decode on the next, or beside prefill where that is all there are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from asking import Answer, generate, prompts
from conftest import next_port, running

from sglang_apb.commands.servers import LocalCluster, LocalServer

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="needs a CUDA device")]

LENGTHS = (300, 1300, 3000)
ARGUMENTS = (
    *("--dtype", "bfloat16", "--max-total-tokens", "12000", "--attention-backend", "flashinfer"),
    # A few CUDA graphs that these prompts fit in, instead of the default's 90, which would have to be captured.
    *("--cuda-graph-max-bs-decode", "4", "--cuda-graph-bs-prefill", "512", "2048", "4096"),
)
# Of log-probabilities in bfloat16, where a decode rank has all heads or half of them.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one KV head, which both of two tensor-parallel ranks have."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    return tiny_models.make("LlamaForCausalLM", smollm2, tmp_path_factory.mktemp("tiny") / "one-head", **sizes)


@pytest.fixture(scope="module", params=[1, 2], ids="tp {}".format)
def num_ranks(request: pytest.FixtureRequest) -> int:
    if request.param > NUM_GPUS:
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


@pytest.fixture(scope="module")
def wanted(num_ranks: int, model: Path, log_dirs: Iterator[Path]) -> list[Answer]:
    arguments = [*ARGUMENTS, "--tp", str(num_ranks)]
    with running(LocalServer(str(model), port=next_port(), log_dir=next(log_dirs), arguments=arguments)) as url:
        return [generate(url, prompt) for prompt in prompts(model, LENGTHS)]


@pytest.mark.parametrize("plane", ["zmq", "cuda_ipc", "nccl"])
def test_kv_of_prefill_ranks_with_the_same_head_goes_to_one_decode_rank(
    plane: str, num_ranks: int, model: Path, wanted: list[Answer], log_dirs: Iterator[Path]
) -> None:
    """Of two ranks, each sends a part of the pages."""
    if plane == "nccl" and num_ranks + 1 > NUM_GPUS:
        pytest.skip(f"needs {num_ranks + 1} GPUs: NCCL does not connect a GPU with itself")
    config = ("--kv-transfer-config", json.dumps({"data_plane": plane}))
    service = LocalCluster(
        str(model),
        port=next_port(),
        log_dir=next(log_dirs),
        sp_size=num_ranks,
        prefill_backend=None,
        arguments=[*ARGUMENTS, *config],
        prefill_arguments=["--tp", str(num_ranks)],
    )
    with running(service) as url:
        wait_for_plane(url, service.groups[1].log_path, plane, num_ranks)
        found = [generate(url, prompt) for prompt in prompts(model, LENGTHS)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_but_for_rounding(ours, theirs)


def wait_for_plane(url: str, decode_log: Path, plane: str, num_ranks: int) -> None:
    """Until all prefill ranks' KV comes so, KV goes over zmq."""
    deadline = time.monotonic() + 60
    while plane != "zmq" and decode_log.read_text().count(f"comes over {plane}") < num_ranks:
        assert time.monotonic() < deadline, f"no {plane} between the ranks"
        generate(url, list(range(100)))


def assert_same_but_for_rounding(found: Answer, wanted: Answer) -> None:
    """Tokens may differ where two were nearly as likely; what follows says nothing any more."""
    steps = zip(found.token_ids, wanted.token_ids, found.logprobs, wanted.logprobs, strict=True)
    for step, (ours, theirs, our_logprob, their_logprob) in enumerate(steps):
        assert abs(our_logprob - their_logprob) < TOLERANCE, f"token {step}: {our_logprob} and {their_logprob}"
        if ours != theirs:
            assert step, "the first token, which prefill computes, is another one"
            print(f"token {step}: {ours} ({our_logprob:.3f}) or {theirs} ({their_logprob:.3f})")
            return
