"""Prompts whose beginning a prefill server has in its prefix cache: found, sent ahead of their batch, and right."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import assert_ran_sparse, generate
from conftest import Plain, cluster, running

pytestmark = pytest.mark.server

# SGLang sends a cached prefix early on GPUs. With overlapping batches it orders that by a CUDA event, so without them
# here: what this test is about is the early send.
EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
ASKED = (300, 1000, 300, 1300, 3000, 1000, 3000, 1300)
SPARSE = 3000
PAGE = 16


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_prefix_that_is_sent_early_ends_no_server(
    num_ranks: int, plain: Plain, log_dirs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact prompts are found again; sparse ones are not, and own pages keep their count."""
    monkeypatch.setenv(EARLY_SEND, "1")
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")  # a page that is freed twice ends the server
    settings = ("--prefill-backend-config", '{"passing": "all", "block": 512, "min_tokens": 2000}')
    arguments = ("--disable-overlap-schedule", "--page-size", str(PAGE))
    service = cluster(plain.model, next(log_dirs), num_ranks, *settings, arguments=arguments)
    asked_before: set[int] = set()
    with running(service) as url:
        for length in ASKED:
            answer = generate(url, plain.prompts[length])
            assert answer.token_ids == plain.answers[length].token_ids, length
            assert answer.prefill is not None
            if length == SPARSE:
                assert_ran_sparse(answer, num_ranks)
                assert answer.cached_tokens == 0
                continue
            is_found = length in asked_before
            assert answer.cached_tokens == ((length - 1) // PAGE * PAGE if is_found else 0)
            # Of an exact prompt in one chunk, nothing else leaves before its batch has ended.
            assert (answer.prefill["kv_bytes_hidden"] > 0) == is_found
            asked_before.add(length)


def test_prompts_that_begin_alike_keep_their_pages(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """In small pools, many at once: pages that SGLang frees as duplicates of the tree's soon belong to another prompt,
    while decode may still read them. Sparse prompts, whose layers leave before their batch has ended, never enter it.
    """
    settings = ("--prefill-backend-config", '{"passing": "all", "block": 256, "min_tokens": 900}')
    pool = ("--max-total-tokens", "4500", "--page-size", str(PAGE))
    service = cluster(plain.model, next(log_dirs), 1, *settings, arguments=pool)
    document = plain.prompts[1300][:800]
    asked = [[*document, *plain.prompts[300][:length], 7 + number] for number in range(4) for length in (40, 200)]
    with running(service) as url, ThreadPoolExecutor(6) as clients:
        alone = [generate(url, prompt).token_ids for prompt in asked]
        together = list(clients.map(lambda number: generate(url, asked[number % 8]), range(64)))
    assert [answer.token_ids for answer in together] == alone * 8
    assert {answer.prefill["method"] for answer in together if answer.prefill} == {"apb", "exact"}
    assert any(answer.cached_tokens >= 800 for answer in together), "no prompt was found, so nothing was tested"
