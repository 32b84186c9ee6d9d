"""Ranks that keep only what they own: slots, rows of the table, and the longest prompt that fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import llama_8b

from sglang_apb import capacity
from sglang_apb.backends.activations import RowSizes
from sglang_apb.backends.apb import ApbBackend
from sglang_apb.backends.base import Wish
from sglang_apb.capacity import Space
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, plan
from sglang_apb.own_slots import OwnSlots


def rows_on_rank_0(layout: Layout) -> int:
    """As if a row took a byte."""
    return layout.most_context_on_a_rank + len(layout.question)


def backend(num_ranks: int, page_size: int, config: ApbConfig) -> Any:
    def make_plan(num_tokens: int, wish: Wish) -> Layout:
        return plan(num_tokens, config, num_ranks=num_ranks, page_size=page_size)

    return SimpleNamespace(plan=make_plan, own_slots=OwnSlots.of, activation_bytes=rows_on_rank_0)


@pytest.mark.parametrize(("num_ranks", "page_size"), [(2, 1), (2, 64), (3, 1), (8, 16)])
def test_r_ranks_hold_r_times_the_prompt(num_ranks: int, page_size: int) -> None:
    num_slots = 50_000
    server = backend(num_ranks, page_size, ApbConfig(block=256))
    space = Space(num_slots, page_size)
    largest = capacity.largest_prompt(server, space)
    assert 0.98 * num_ranks * num_slots < largest < num_ranks * num_slots
    kept = [OwnSlots.of(server.plan(largest + more, Wish())).num_slots for more in (0, 1)]
    assert [space.fits(slots) for slots in kept] == [True, False]


def test_activations_limit_a_prompt_that_slots_would_take() -> None:
    server = backend(2, 1, ApbConfig(block=256))
    largest = capacity.largest_prompt(server, Space(50_000, 1, activation_bytes=20_000))
    assert [rows_on_rank_0(server.plan(largest + more, Wish())) <= 20_000 for more in (0, 1)] == [True, False]
    assert capacity.largest_prompt(server, Space(50_000, 1, activation_bytes=0)) <= 1


def test_a_pool_leaves_what_its_prompt_takes() -> None:
    """Llama-3.1-8B on 63 GiB beside its weights: slots for more than half of 512K tokens on each of two GPUs."""
    sizes, free = RowSizes.of(llama_8b()), 63 << 30
    free -= capacity.FIXED_BYTES + sizes.feed_forward_bytes(24576)
    kv, row = sizes.kv_bytes_per_token(32), sizes.bytes_per_row()
    assert kv == 131072
    pool = capacity.pool_bytes(free, kv, lambda num_tokens: num_tokens * row)
    num_tokens = pool // kv
    assert num_tokens > 262_144 + 256
    assert pool + num_tokens * row <= free < pool + kv + (num_tokens + 1) * row
    assert capacity.pool_bytes(-1, kv, lambda num_tokens: num_tokens) == 0
    assert sizes.bytes_per_row(num_ranks_gathered=2) > sizes.bytes_per_row()


def test_no_more_is_left_than_the_models_longest_prompt_takes() -> None:
    assert capacity.pool_bytes(1000, 3, lambda num_tokens: 2 * min(num_tokens, 200)) == 600
    assert capacity.pool_bytes(1000, 3, lambda num_tokens: 2 * min(num_tokens, 50)) == 900


def test_in_rounds_a_longer_prompt_takes_little_more() -> None:
    """Of Llama-3.1-8B: what a bound leaves of passing tokens in 32 layers; of one layer the question's keys, and all
    blocks' passing tokens, one in eight, where they are chosen anew behind a found context.
    """
    of_prompt = {
        round_tokens: ApbBackend.activations(llama_8b(), ApbConfig(round_tokens=round_tokens), 1, 1, False)
        for round_tokens in (16384, 1 << 20)
    }
    whole, in_rounds = of_prompt[1 << 20], of_prompt[16384]
    assert in_rounds(16384) == whole(16384)
    handed_on = 32 * (512 + 16384 + 16 * 128) * 4096
    one_layer = 1_000_000 * 4096 * 9 // 8
    assert in_rounds(1_000_000) - handed_on < one_layer + 2e9 < whole(1_000_000) / 5
    assert in_rounds(1_000_000) - in_rounds(500_000) == pytest.approx(one_layer / 2, rel=0.01)


def test_a_question_counts_with_its_partial_results() -> None:
    """[num_q_heads, head_dim] and a log-sum-exp a row, in float32: of two attentions, of both, and of all ranks."""
    sizes = RowSizes.of(llama_8b())
    a_row = 4 * (32 * 128 + 4 * 32)
    assert sizes.partial_bytes_per_question_row(1) == int(1.15 * 2 * a_row)
    assert sizes.partial_bytes_per_question_row(4) == int(1.15 * 7 * a_row)
