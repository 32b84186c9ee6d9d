"""Prompts whose beginning is in the prefix cache: found, right, and on a prefill server sent ahead of their batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from asking import GREEDY, Answer, assert_ran_sparse, assert_same_tokens, generate
from conftest import Plain, cluster, running, server, thorough

pytestmark = pytest.mark.server

# SGLang sends a cached prefix early on GPUs. With overlapping batches it orders that by a CUDA event, so without them
# here: what this test is about is the early send.
EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
ASKED = (300, 3000, 1300, 300, 3000)
SPARSE = 3000
PAGE = 16


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=thorough), 2])
def test_a_prefix_that_is_sent_early_ends_no_server(
    num_ranks: int, plain: Plain, log_dirs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact prompts are found again, and of sparse ones whole units of a block a rank; all slots come back."""
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
            is_found = length in asked_before
            if length == SPARSE:
                assert_ran_sparse(answer, num_ranks)
                context_end = (length - 256) // PAGE * PAGE
                unit = PAGE if num_ranks == 1 else num_ranks * 512
                assert answer.cached_tokens == (context_end // unit * unit if is_found else 0)
                asked_before.add(length)
                continue
            assert answer.cached_tokens == ((length - 1) // PAGE * PAGE if is_found else 0)
            # Of an exact prompt in one chunk, nothing else leaves before its batch has ended.
            assert (answer.prefill["kv_bytes_hidden"] > 0) == is_found
            asked_before.add(length)


def test_prompts_that_begin_alike_keep_their_pages(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """In small pools, many at once: pages that SGLang frees as duplicates of the tree's soon belong to another prompt,
    while decode may still read them. A sparse prompt's, whose layers leave before their batch has ended, stay its own.
    """
    settings = ("--prefill-backend-config", '{"passing": "all", "block": 256, "min_tokens": 900}')
    pool = ("--max-total-tokens", "4500", "--page-size", str(PAGE))
    service = cluster(plain.model, next(log_dirs), 1, *settings, arguments=pool)
    document = plain.prompts[1300][:800]
    asked = [[*document, *plain.prompts[300][:length], 7 + number] for number in range(4) for length in (40, 200)]
    with running(service) as url, ThreadPoolExecutor(6) as clients:
        alone = [generate(url, prompt).token_ids for prompt in asked]
        together = list(clients.map(lambda number: generate(url, asked[number % 8]), range(40)))
    assert [answer.token_ids for answer in together] == alone * 5
    assert {answer.prefill["method"] for answer in together if answer.prefill} == {"apb", "exact"}
    assert any(answer.cached_tokens >= 800 for answer in together), "no prompt was found, so nothing was tested"


# In rounds of one block a rank, between which others run.
LOSSY = (
    '{"block": 128, "anchor": 64, "passing": 16, "round_tokens": 128, "between_rounds": 300, "min_tokens": 256, '
    '"question_tokens": 40}'
)
EXACT = GREEDY | {"custom_params": {"prefill": {"exact": True}}}


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=thorough), 2, pytest.param(3, marks=thorough)])
def test_a_context_is_found_again(num_ranks: int, plain: Plain, log_dirs: Iterator[Path]) -> None:
    """Whole, in part, from the midst of a block on: the answer is one without a cache's, in rounds or in one piece."""
    arguments = ("--prefill-backend", "apb", "--sp-size", str(num_ranks), "--prefill-backend-config", LOSSY)
    document = plain.prompts[1300]
    context_end = len(document) - 40
    asked = {
        "another question": ([*document[:context_end], *range(500, 540)], context_end),
        "a longer text": ([*document, *range(200, 410)], context_end),
        "from a block's midst on": ([*document[:900], *([77, 78] * 100)], 900),
        "a part of it": (document[:1000], 960),
    }

    def ask(prompt: list[int], num_cached: int) -> Answer:
        answer = generate(url, prompt)
        assert_ran_sparse(answer, num_ranks)
        assert answer.cached_tokens == num_cached
        return answer

    with running(server(plain.model, next(log_dirs), *arguments)) as url:
        for name, (prompt, num_cached) in asked.items():
            requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
            first, again = ask(document, 0), ask(document, context_end)
            assert_same_tokens(again, first)
            found = ask(prompt, num_cached)
            exact = generate(url, document, sampling_params=EXACT)
            assert exact.cached_tokens == 0, "exact attention's prompts find no sparse context"
            assert exact.token_ids == plain.answers[1300].token_ids
            assert_same_tokens(ask(document, context_end), first)
            requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
            print(name)
            assert_same_tokens(ask(prompt, 0), found)
    if num_ranks > 1:
        return
    in_one_piece = (*arguments[:-1], json.dumps(json.loads(LOSSY) | {"round_tokens": 10_000}))
    with running(server(plain.model, next(log_dirs), *in_one_piece)) as url:
        assert_same_tokens(ask(document, 0), first)


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=thorough), 2])
@pytest.mark.parametrize("is_early", [pytest.param(False, marks=thorough), True], ids="early send: {}".format)
def test_a_prefill_server_finds_a_context_again(
    is_early: bool, num_ranks: int, plain: Plain, log_dirs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cached leaves before the prompt's own batch, or with its layers; many that are alike at once.

    Several ranks find whole units of a block each, and make the same calls of the cache.
    """
    monkeypatch.setenv(EARLY_SEND, str(int(is_early)))
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")
    monkeypatch.setenv("SGLANG_ENABLE_RANK_CONSENSUS_CHECKER", str(int(num_ranks > 1)))
    arguments = ("--page-size", str(PAGE), *(("--disable-overlap-schedule",) if is_early else ()))
    service = cluster(plain.model, next(log_dirs), num_ranks, "--prefill-backend-config", LOSSY, arguments=arguments)
    least = 688 if num_ranks == 1 else 512
    document = plain.prompts[1300]
    asked = [[*document[:length], *range(300, 350 + number)] for number, length in enumerate((1250, 700, 1200, 900))]
    with running(service) as url, ThreadPoolExecutor(6) as clients:
        alone = [generate(url, prompt, extra_key=f"alone {number}") for number, prompt in enumerate(asked)]
        assert not any(answer.cached_tokens for answer in alone)
        found = [generate(url, prompt) for prompt in asked]
        together = list(clients.map(lambda number: generate(url, asked[number % 4], extra_key="together"), range(24)))
    assert found[0].cached_tokens == 0 and all(answer.cached_tokens >= least for answer in found[1:])
    for number, answer in enumerate([*found, *together]):
        assert_ran_sparse(answer, num_ranks)
        assert answer.token_ids == alone[number % 4].token_ids, number
    assert all(answer.cached_tokens >= least for answer in together[-4:])


def test_contexts_come_and_go_in_a_small_pool(plain: Plain, log_dirs: Iterator[Path]) -> None:
    """Many at once: contexts are evicted, requests are retracted, and clients leave."""
    arguments = ("--prefill-backend", "apb", "--sp-size", "2", "--max-total-tokens", "4000", "--page-size", str(PAGE))
    document = plain.prompts[1300]
    asked = [
        [*document[:length], *range(300, 340 + number)] for number, length in enumerate((400, 700, 1000, 1300) * 2)
    ]

    def ask(number: int) -> Answer | None:
        leaves = number % 5 == 4
        try:
            return generate(url, asked[number % 8], timeout=0.3 if leaves else 300)
        except requests.Timeout:
            assert leaves
            return None

    service = server(plain.model, next(log_dirs), *arguments, "--prefill-backend-config", LOSSY)
    with running(service) as url, ThreadPoolExecutor(6) as clients:
        alone = []
        for prompt in asked:
            requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
            alone.append(generate(url, prompt))
        together = list(clients.map(ask, range(40)))
    for number, answer in enumerate(together):
        if answer is not None:
            assert answer.token_ids == alone[number % 8].token_ids, number
    assert sum(answer.cached_tokens for answer in together if answer is not None) > 0
