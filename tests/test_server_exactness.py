"""Through real servers: with everything passed on, APB's tokens are plain SGLang's, on any number of ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from asking import ALL_PASSED, assert_ran_sparse, assert_same_tokens, generate, prompts
from conftest import PLAIN_LENGTHS, Plain, cluster, running, server, thorough

pytestmark = pytest.mark.server
LENGTHS = PLAIN_LENGTHS[1:]
APB = ("--prefill-backend", "apb", "--prefill-backend-config", ALL_PASSED)


def check(url: str, plain: Plain, num_ranks: int) -> None:
    for length in LENGTHS:
        answer = generate(url, plain.prompts[length])
        assert_ran_sparse(answer, num_ranks)
        assert_same_tokens(answer, plain.answers[length])


@thorough
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_one_server_equals_plain_sglang(num_ranks: int, plain: Plain, log_dirs: Iterator[Path]) -> None:
    with running(server(plain.model, next(log_dirs), *APB, "--sp-size", str(num_ranks))) as url:
        check(url, plain, num_ranks)


# Ranks, page size, and KV slots of each rank: with several ranks fewer than the longest prompt has tokens, and too
# few for two prompts, so that a slot that is not given back is missed at once.
@pytest.mark.parametrize(
    ("num_ranks", "page_size", "num_slots"),
    [
        pytest.param(1, 1, 12000, marks=thorough),
        pytest.param(2, 1, 1900, marks=thorough),
        (3, 16, 1392),
    ],
)
def test_disaggregated_over_zmq_equals_plain_sglang(
    num_ranks: int, page_size: int, num_slots: int, plain: Plain, log_dirs: Iterator[Path]
) -> None:
    prefill = ("--prefill-backend-config", ALL_PASSED, "--max-total-tokens", str(num_slots))
    service = cluster(plain.model, next(log_dirs), num_ranks, *prefill, arguments=("--page-size", str(page_size)))
    with running(service) as url:
        check(url, plain, num_ranks)
        shortest, longest = plain.prompts[LENGTHS[0]], plain.prompts[LENGTHS[-1]]
        num_tokens = -(-len(shortest) // page_size) * page_size
        report = generate(url, shortest).prefill
        assert report is not None
        assert report["kv_bytes"] == num_tokens * plain.num_layers * 2 * 3 * 64 * 4  # K and V, KV heads, head, float32
        # Layer by layer: most of them are gone before the last one is computed.
        assert report["kv_bytes"] // 2 < report["kv_bytes_hidden"] <= report["kv_bytes"]
        assert report["kv_data_plane"] == "zmq", "there is no other on a CPU"
        if num_ranks > 1:
            check_limits(url, plain.model, longest, num_slots)
            assert_same_tokens(generate(url, longest), plain.answers[LENGTHS[-1]])


def check_limits(url: str, model: Path, prompt: list[int], num_slots: int) -> None:
    """What does not fit is refused at once, with its numbers: on exact attention, every rank keeps the whole prompt."""
    from transformers import AutoTokenizer

    too_long = requests.post(f"{url}/generate", json={"input_ids": prompt * 2}, timeout=60)
    assert not too_long.ok
    assert re.search(r"6000 tokens\) exceeds the maximum allowed length \(\d{4} tokens\)", too_long.text), too_long.text
    text = AutoTokenizer.from_pretrained(model).decode(prompt)
    wish = {"custom_params": {"prefill": {"exact": True}}}  # SGLang's router passes it on here only
    body = {"model": "default", "prompt": text, "max_tokens": 4} | wish
    exact = requests.post(f"{url}/v1/completions", json=body, timeout=60)
    assert not exact.ok
    assert re.search(rf"\d{{4}} tokens does not fit in the {num_slots} KV slots of a rank", exact.text), exact.text


@pytest.mark.parametrize(
    ("family", "config", "page_size"),
    [
        # In SGLang it is Llama under another name.
        pytest.param("MistralForCausalLM", ALL_PASSED, 1, marks=thorough),
        pytest.param("Qwen2ForCausalLM", ALL_PASSED, 16, marks=thorough),
        ("Qwen3ForCausalLM", ALL_PASSED, 16),
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
