"""Through real servers: with everything passed on, APB's tokens are plain SGLang's, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import ALL_PASSED, Answer, assert_ran_sparse, assert_same_tokens, generate, prompts
from conftest import cluster, running, server

pytestmark = pytest.mark.server
LENGTHS = (1000, 1300, 1700, 2200, 3000)
APB = ("--prefill-backend", "apb", "--prefill-backend-config", ALL_PASSED)


@pytest.fixture(scope="module")
def asked(smollm2: Path) -> list[list[int]]:
    return prompts(smollm2, LENGTHS)


@pytest.fixture(scope="module")
def plain_answers(smollm2: Path, asked: list[list[int]], log_dirs: Iterator[Path]) -> list[Answer]:
    """Of a server without any option of ours."""
    with running(server(smollm2, next(log_dirs))) as url:
        return [generate(url, prompt) for prompt in asked]


def check(url: str, asked: list[list[int]], plain_answers: list[Answer], num_ranks: int) -> None:
    for prompt, plain in zip(asked, plain_answers, strict=True):
        answer = generate(url, prompt)
        assert_ran_sparse(answer, num_ranks)
        assert_same_tokens(answer, plain)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_one_server_equals_plain_sglang(
    num_ranks: int, smollm2: Path, asked: list[list[int]], plain_answers: list[Answer], log_dirs: Iterator[Path]
) -> None:
    with running(server(smollm2, next(log_dirs), *APB, "--sp-size", str(num_ranks))) as url:
        check(url, asked, plain_answers, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_disaggregated_over_zmq_equals_plain_sglang(
    num_ranks: int, smollm2: Path, asked: list[list[int]], plain_answers: list[Answer], log_dirs: Iterator[Path]
) -> None:
    config = ("--prefill-backend-config", ALL_PASSED)
    with running(cluster(smollm2, next(log_dirs), num_ranks, *config)) as url:
        check(url, asked, plain_answers, num_ranks)
        num_kv_bytes = len(asked[0]) * 30 * 2 * 3 * 64 * 4  # layers, K and V, KV heads, head, float32
        assert generate(url, asked[0]).prefill["kv_bytes"] == num_kv_bytes  # type: ignore[index]


@pytest.mark.parametrize(
    ("family", "config", "page_size"),
    [
        ("MistralForCausalLM", ALL_PASSED, 1),
        ("Qwen2ForCausalLM", ALL_PASSED, 16),
        ("Qwen3ForCausalLM", ALL_PASSED, 1),
    ],
)
def test_every_family_runs_sparse_and_equals_its_exact_path(
    family: str, config: str, page_size: int, tiny: Callable[[str], Path], log_dirs: Iterator[Path]
) -> None:
    """Biases, QK-norm, grouped heads; two ranks do not divide Qwen's page of 16 tokens evenly."""
    model = tiny(family)
    arguments = ("--prefill-backend", "apb", "--sp-size", "2", "--prefill-backend-config", config)
    with running(server(model, next(log_dirs), *arguments, "--page-size", str(page_size))) as url:
        for prompt in prompts(model, (700, 1501)):
            exact = {
                "max_new_tokens": 32,
                "temperature": 0,
                "ignore_eos": True,
                "custom_params": {"prefill": {"exact": True}},
            }
            plain = generate(url, prompt, sampling_params=exact)
            assert plain.prefill == {"method": "exact"}
            sparse = generate(url, prompt)
            assert_ran_sparse(sparse, num_ranks=2)
            assert_same_tokens(sparse, plain)
