"""Ranks that keep only what they own: slots, rows of the table, and the longest prompt that fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_apb.patches import kv_ownership
from tiny_models import llama_8b

from sglang_apb import capacity
from sglang_apb.backends.activations import RowSizes
from sglang_apb.backends.apb import ApbBackend
from sglang_apb.backends.base import KeptTokens, Wish
from sglang_apb.capacity import Space
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, Span, plan
from sglang_apb.requests import Notes


def kept_by(layout: Layout, rank: int) -> KeptTokens:
    own = tuple(layout.rows_of(rank).block_tokens.values())
    return KeptTokens(layout.num_tokens, own, layout.most_context_on_a_rank, layout.question)


def rows_on_rank_0(layout: Layout) -> int:
    """As if a row took a byte."""
    return layout.most_context_on_a_rank + len(layout.question)


def backend(num_ranks: int, page_size: int, config: ApbConfig) -> Any:
    def make_plan(num_tokens: int, wish: Wish) -> Layout:
        return plan(num_tokens, config, num_ranks=num_ranks, page_size=page_size)

    return SimpleNamespace(
        plan=make_plan, kept_tokens=lambda layout: kept_by(layout, 0), activation_bytes=rows_on_rank_0
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("page_size", [1, 16])
def test_ranks_keep_every_token_once_in_as_many_slots_each(num_ranks: int, page_size: int) -> None:
    layout = plan(5003, ApbConfig(block=297), num_ranks=num_ranks, page_size=page_size)
    every = [kept_by(layout, rank) for rank in range(num_ranks)]
    assert len({kept.num_slots for kept in every}) == 1
    context = sorted(token for kept in every for span in kept.context for token in range(span.start, span.end))
    assert context == list(range(layout.context_end))
    for kept in every:
        slots = torch.arange(100, 100 + kept.num_slots)
        row = kv_ownership._row(kept, slots)
        own = torch.cat([row[span.start : span.end] for span in (*kept.context, kept.question)])
        assert torch.equal(own, own.unique()) and own.min() >= 100  # real slots, in order, each once
        assert int((row == 0).sum()) == kept.num_tokens - len(own)
        assert kept.num_elsewhere == kept.num_tokens - kept.num_slots > 0


def test_a_prompt_that_was_batched_or_cut_gets_every_slot() -> None:
    """SGLang's own allocation; in its forward pass it fails."""
    kept = kept_by(plan(1000, ApbConfig(block=188), num_ranks=2), 0)
    req = SimpleNamespace(prefill_notes=Notes(kept=kept))
    alone = SimpleNamespace(reqs=[req], prefix_lens=[0], extend_lens=[1000])
    assert kv_ownership._kept_tokens(alone) is kept
    for batch in (
        SimpleNamespace(reqs=[req], prefix_lens=[0], extend_lens=[999]),
        SimpleNamespace(reqs=[req, SimpleNamespace()], prefix_lens=[0, 0], extend_lens=[1000, 9]),
        SimpleNamespace(reqs=[SimpleNamespace()], prefix_lens=[0], extend_lens=[1000]),
    ):
        assert kv_ownership._kept_tokens(batch) is None
        assert kv_ownership._allocate(lambda batch: "SGLang's own", batch) == "SGLang's own"


def test_more_own_tokens_than_slots_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="5 context tokens do not fit in 4 slots"):
        KeptTokens(9, (Span(0, 5),), 4, Span(8, 9))


@pytest.mark.parametrize(("num_ranks", "page_size"), [(2, 1), (2, 64), (3, 1), (8, 16)])
def test_r_ranks_hold_r_times_the_prompt(num_ranks: int, page_size: int) -> None:
    num_slots = 50_000
    server = backend(num_ranks, page_size, ApbConfig(block=256))
    space = Space(num_slots, page_size)
    largest = capacity.largest_prompt(server, space)
    assert 0.98 * num_ranks * num_slots < largest < num_ranks * num_slots
    kept = [kept_by(server.plan(largest + more, Wish()), 0).num_slots for more in (0, 1)]
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
    """Of Llama-3.1-8B: what a bound leaves of passing tokens in 32 layers, and one layer's keys for the question."""
    of_prompt = {
        round_tokens: ApbBackend.activations(llama_8b(), ApbConfig(round_tokens=round_tokens), 1, 1, False)
        for round_tokens in (16384, 1 << 20)
    }
    whole, in_rounds = of_prompt[1 << 20], of_prompt[16384]
    assert in_rounds(16384) == whole(16384)
    handed_on = 32 * (512 + 16384 + 16 * 128) * 4096
    assert in_rounds(1_000_000) - handed_on < 1_000_000 * 4096 + 2e9 < whole(1_000_000) / 5
    assert in_rounds(1_000_000) - in_rounds(500_000) == pytest.approx(500_000 * 4096, rel=0.01)


def test_a_question_counts_with_its_partial_results() -> None:
    """[num_q_heads, head_dim] and a log-sum-exp a row, in float32: of two attentions, of both, and of all ranks."""
    sizes = RowSizes.of(llama_8b())
    a_row = 4 * (32 * 128 + 4 * 32)
    assert sizes.partial_bytes_per_question_row(1) == int(1.15 * 2 * a_row)
    assert sizes.partial_bytes_per_question_row(4) == int(1.15 * 7 * a_row)


def test_slots_are_given_back_with_the_spare_ones() -> None:
    """SGLang frees the question, which stands in the table; the context, spare slots included, is freed before."""
    layout = plan(1000, ApbConfig(block=250), num_ranks=2)
    kept = kept_by(layout, 1)
    freed: list[torch.Tensor] = []
    allocator = SimpleNamespace(free_segment=lambda slots, start_pos: freed.append(slots))
    notes = Notes(kept=kept, slots=torch.arange(7, 7 + kept.num_slots))
    req = SimpleNamespace(prefill_notes=notes, kv=SimpleNamespace(holds_kv=True))
    row = kv_ownership._row(kept, notes.slots)

    def as_sglang(req: Any, tree_cache: Any, checkpoint: bool) -> None:
        freed.append(row[req.kv.cache_protected_len :])

    release = next(patch.hook for patch in kv_ownership.PATCHES if patch.target.endswith("release_kv_cache"))
    for _ in range(2):  # a second release has nothing left to give
        release(as_sglang, req, SimpleNamespace(token_to_kv_pool_allocator=allocator), checkpoint=True)
        row = row[:0]
    assert torch.equal(torch.cat(freed).sort().values, torch.arange(7, 7 + kept.num_slots))
