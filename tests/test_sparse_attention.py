"""Every engine, rank count and option against the fp32 oracle, one layer at a time."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from ranks import run_ranks
from sglang_apb.kernels import REFERENCE, TRITON, Kernels
from sglang_apb.kernels.candidates import Candidates

from sglang_apb import selection
from sglang_apb.attention import sdpa
from sglang_apb.attention.base import Piece
from sglang_apb.attention.sdpa import SdpaEngine
from sglang_apb.backends import sparse_attention
from sglang_apb.backends.handed_on import HandedOn, Shared
from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, Span, plan
from sglang_apb.rank_group import RankGroup
from sglang_apb.rounds import rounds_of

# tests/test_kernels.py runs this file in Triton's interpreter, too, where our kernels compute what goes with attention.
KERNELS = TRITON if os.environ.get("TRITON_INTERPRET") == "1" else REFERENCE
NUM_TOKENS, QUESTION, HEAD_DIM = 203, 23, 16
SCALE = HEAD_DIM**-0.5
TOLERANCE = 2e-6  # float32 rounding over some hundred keys; a single lost or doubled key moves rows by 1e-3 and more

CONFIGS = {
    "many blocks": ApbConfig(block=12, anchor=12, passing=4),
    "few blocks": ApbConfig(block=45, anchor=10, passing=6),
    "anchor over several blocks": ApbConfig(block=20, anchor=50, passing=5),
    "nothing passed": ApbConfig(block=36, anchor=12, passing=0),
    "no anchor": ApbConfig(block=30, anchor=0, passing=7),
    "chosen by the question": ApbConfig(block=40, anchor=20, passing=9, selector="query"),
    "a bound": ApbConfig(block=4, anchor=10, passing=2, max_passing=19),
    "a bound that leaves some periods whole": ApbConfig(
        block=3, anchor=10, passing=1, max_passing=30, selector="query"
    ),
    "the paper's, chosen by keys": ApbConfig(
        block=45, anchor=30, passing=6, anchor_mode="recomputed", order="two_pass"
    ),
    "short last block": ApbConfig(block=50, anchor=20, passing=9),
    "more ranks than blocks": ApbConfig(block=90, anchor=20, passing=9),
    "recomputed": ApbConfig(block=45, anchor=30, passing=6, selector="query", anchor_mode="recomputed"),
    "the paper's": ApbConfig(
        block=45, anchor=30, passing=6, selector="query", anchor_mode="recomputed", order="two_pass"
    ),
}


def layout_of(config: ApbConfig, num_ranks: int = 1) -> Layout:
    return plan(NUM_TOKENS, config, num_ranks=num_ranks, question_tokens=QUESTION)


def random_sequence(layout: Layout, num_q_heads: int = 6, num_kv_heads: int = 2, seed: int = 0) -> oracle.Sequence:
    generator = torch.Generator().manual_seed(seed)
    num_rows = oracle.num_copied(layout) + layout.num_tokens

    def draw(num_heads: int) -> torch.Tensor:
        return torch.randn(num_rows, num_heads, HEAD_DIM, generator=generator)

    return oracle.Sequence(draw(num_q_heads), draw(num_kv_heads), draw(num_kv_heads))


def asking_rows(layout: Layout, config: ApbConfig) -> slice:
    """The rows, in the oracle's order, whose queries choose what to pass."""
    if config.order == "two_pass":
        head = min(16, layout.anchor)
        return slice(head, head + QUESTION)
    copied = oracle.num_copied(layout)
    return slice(copied + layout.context_end, copied + layout.num_tokens)


def expected(sequence: oracle.Sequence, layout: Layout, config: ApbConfig) -> torch.Tensor:
    chosen = oracle.select(sequence, layout, asking_rows(layout, config), config.selector)
    return oracle.attend(sequence, oracle.mask(layout, chosen, sequence.k.shape[1]), SCALE)


def local_rows(layout: Layout, rank: int) -> torch.Tensor:
    """Numbers of a rank's rows in the oracle's order."""
    copied = oracle.num_copied(layout)
    rows = list(range(copied))
    for span in layout.rows_of(rank).block_tokens.values():
        rows += range(copied + span.start, copied + span.end)
    question = layout.question if layout.is_last_round else Span(0, 0)
    return torch.tensor(rows + list(range(copied + question.start, copied + question.end)), dtype=torch.int64)


def attend_on_rank(
    group: Any,
    sequence: oracle.Sequence,
    layout: Layout,
    config: ApbConfig,
    device: str = "cpu",
    kernels: Kernels = KERNELS,
) -> torch.Tensor:
    ranks = RankGroup(group)
    attention = SparseAttention(layout, ranks, SdpaEngine(kernels), selection.create(config.selector), device)
    index = local_rows(layout, ranks.rank)
    q, k, v = (rows[index].to(device) for rows in (sequence.q, sequence.k, sequence.v))
    if config.order == "one_pass":
        return attention.attend(LayerRows(q, k, v, SCALE))
    end, context = attention.rows.context.end, attention.rows.context
    first = attention.attend_context(LayerRows(q[:end], k[:end], v[:end], SCALE))
    second = attention.attend_question(
        LayerRows(q[end:], k[end:], v[end:], SCALE), k[context.start : end], v[context.start : end]
    )
    return torch.cat((first, second))


def error_on_one_rank(config: ApbConfig, **heads: int) -> float:
    layout = layout_of(config)
    sequence = random_sequence(layout, **heads)
    found = attend_on_rank(None, sequence, layout, config)
    return float((found - expected(sequence, layout, config)).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_equals_the_oracle(name: str) -> None:
    assert error_on_one_rank(CONFIGS[name]) < TOLERANCE


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (8, 8), (9, 3), (8, 1)])
def test_any_grouping_of_heads_equals_the_oracle(num_q_heads: int, num_kv_heads: int) -> None:
    config = CONFIGS["few blocks"]
    assert error_on_one_rank(config, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads) < TOLERANCE


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (60, 10**6), (10**6, 40)], ids=["alone", "some", "few keys"])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_attended_in_any_groups_equal_the_oracle(
    name: str, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_attention, "QUERIES_A_CALL", queries)
    monkeypatch.setattr(sparse_attention, "KEYS_A_CALL", keys)
    assert error_on_one_rank(CONFIGS[name]) < TOLERANCE


def _last_layer_error(group: Any, num_ranks: int) -> float:
    """Distance of the question's rows, attended alone, from those of the whole layer."""
    layout = layout_of(CONFIGS["few blocks"], num_ranks)
    sequence = random_sequence(layout)
    attention = SparseAttention(layout, RankGroup(group), SdpaEngine(), selection.create("query"), "cpu")
    index = local_rows(layout, RankGroup(group).rank)
    layer = LayerRows(sequence.q[index], sequence.k[index], sequence.v[index], SCALE)
    meanwhile: list[str] = []
    found = attention.attend_last(layer, lambda: meanwhile.append("called"))
    assert meanwhile == ["called"]
    return float((found - attention.attend(layer)[-QUESTION:]).abs().max())


def test_the_last_layer_needs_the_questions_rows_alone() -> None:
    assert max([_last_layer_error(None, 1), *run_ranks(2, _last_layer_error, 2)]) < TOLERANCE


def errors_on_rank(group: Any, num_ranks: int, device: str = "cpu") -> dict[str, float]:
    """Largest distance from the oracle with each of CONFIGS."""
    errors = {}
    for name, config in CONFIGS.items():
        layout = layout_of(config, num_ranks)
        sequence = random_sequence(layout)
        wanted = expected(sequence, layout, config)[local_rows(layout, RankGroup(group).rank)]
        found = attend_on_rank(group, sequence, layout, config, device).cpu()
        errors[name] = float((found - wanted).abs().max())
    return errors


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_equals_the_oracle(num_ranks: int) -> None:
    for rank, errors in enumerate(run_ranks(num_ranks, errors_on_rank, num_ranks)):
        for name, error in errors.items():
            assert error < TOLERANCE, f"rank {rank}, {name}"


def _fail_on_rank_one(group: Any) -> None:
    assert RankGroup(group).rank == 0, "deliberate"


def test_a_failing_rank_fails_its_parent() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*deliberate"):
        run_ranks(2, _fail_on_rank_one, timeout_s=60)


def dense_causal(sequence: oracle.Sequence) -> torch.Tensor:
    num_rows, num_kv_heads = sequence.k.shape[:2]
    return oracle.attend(sequence, torch.ones(num_kv_heads, num_rows, num_rows, dtype=torch.bool).tril(), SCALE)


@pytest.mark.parametrize(
    "config",
    [
        ApbConfig(passing="all", anchor=0, block=12),
        ApbConfig(passing="all", anchor=30, block=36),
        ApbConfig(passing="all", anchor=100, block=26),
        ApbConfig(passing=45, anchor=45, block=45),
        ApbConfig(passing=8, anchor=5, block=8, max_passing=203),
        ApbConfig(block=180, anchor=13, passing=2),
        ApbConfig(block=90, anchor=90, passing=0),
    ],
    ids=[
        "all, no anchor",
        "all",
        "all, anchor over blocks",
        "p = block",
        "p = block, bound",
        "V = 1",
        "V = 2, a = block, p = 0",
    ],
)
def test_limits_that_equal_exact_attention(config: ApbConfig) -> None:
    layout = layout_of(config)
    sequence = random_sequence(layout)
    found = attend_on_rank(None, sequence, layout, config)
    assert float((found - dense_causal(sequence)).abs().max()) < TOLERANCE


def context_rows(num_tokens: int, config: ApbConfig, sequence: oracle.Sequence) -> torch.Tensor:
    """Of the context of a prompt that is the sequence's first tokens."""
    layout = plan(num_tokens, config, question_tokens=QUESTION)
    start = oracle.Sequence(sequence.q[:num_tokens], sequence.k[:num_tokens], sequence.v[:num_tokens])
    return attend_on_rank(None, start, layout, config)[: layout.context_end]


@pytest.mark.parametrize("max_passing", [None, 19, 40])
def test_appended_text_changes_no_row_of_the_context(max_passing: int | None) -> None:
    """So the K and V of every layer stay, and can be found again."""
    config = ApbConfig(block=4, anchor=10, passing=2, max_passing=max_passing)
    sequence = random_sequence(layout_of(config))
    whole = context_rows(NUM_TOKENS, config, sequence)
    for num_tokens in (60, 109, 110, 150, 151):
        rows = context_rows(num_tokens, config, sequence)
        assert float((rows - whole[: len(rows)]).abs().max()) < TOLERANCE
    asked = replace(config, selector="query")
    rows = context_rows(150, asked, sequence)
    assert float((rows - context_rows(NUM_TOKENS, asked, sequence)[: len(rows)]).abs().max()) > 100 * TOLERANCE


# Of 180 context tokens: none; nothing but a part of the first block or the anchor; on a border, and beside one; all but
# one; all.
CACHED = (0, 1, 7, 40, 90, 91, 135, 179, 180)
# Tokens that each rank computes in a round: one block, some, all.
ROUND_TOKENS = (1, 25, NUM_TOKENS)
CACHING = [name for name, config in CONFIGS.items() if config.anchor_mode == "shared" and config.selector == "key_diff"]


def layer_of(
    sequence: oracle.Sequence, attention: SparseAttention, rank: int, device: str
) -> tuple[torch.Tensor, LayerRows]:
    """A round's rows: their numbers, and what a layer has of them."""
    layout = attention.layout
    rows, cached = local_rows(layout, rank), torch.empty(0, dtype=torch.int64)
    if attention.num_cached:
        cached = torch.cat([torch.arange(span.start, span.end) for span in layout.cached_on(rank)])
        assert len(cached) == attention.num_cached
    keys = torch.cat((cached, rows))
    return rows, LayerRows(sequence.q[rows].to(device), *(x[keys].to(device) for x in (sequence.k, sequence.v)), SCALE)


def errors_of_rounds(group: Any, device: str = "cpu") -> dict[str, float]:
    """Largest distance of rows that come round after round from those of the whole prompt, with each of CACHING.

    The first round begins behind cached tokens.
    """
    ranks, errors = RankGroup(group), {}
    for name, num_cached, round_tokens in itertools.product(CACHING, CACHED, ROUND_TOKENS):
        errors[f"{name}, {num_cached} cached, rounds of {round_tokens}"] = error_of_rounds(
            ranks, CONFIGS[name], num_cached, round_tokens, device
        )
    return errors


def error_of_rounds(
    ranks: RankGroup, config: ApbConfig, num_cached: int, round_tokens: int, device: str = "cpu"
) -> float:
    sequence = random_sequence(layout_of(config))
    wanted = expected(sequence, layout_of(config), config)
    whole, handed_on, error, start = layout_of(config, ranks.size), HandedOn(), 0.0, num_cached
    while True:
        end = rounds_of(whole, round_tokens).end_of(start)
        layout = replace(whole, num_cached=start, round_end=end)
        engine, selector = SdpaEngine(KERNELS), selection.create(config.selector)
        attention = SparseAttention(layout, ranks, engine, selector, device, handed_on)
        rows, layer = layer_of(sequence, attention, ranks.rank, device)
        found, last = attention.attend(layer).cpu(), attention.attend_last(layer).cpu()
        error = max(error, float((found - wanted[rows]).abs().max()))
        if end is None:
            return max(error, float((last - wanted[rows[-QUESTION:]]).abs().max()))
        handed_on.num_tokens = start = end


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_rows_of_any_rounds_are_those_of_the_whole_prompt(num_ranks: int) -> None:
    of_ranks = run_ranks(num_ranks, errors_of_rounds) if num_ranks > 1 else [errors_of_rounds(None)]
    assert len(CACHING) >= 8
    for rank, errors in enumerate(of_ranks):
        for name, error in errors.items():
            assert error < TOLERANCE, f"rank {rank}, {name}"


def test_three_blocks_without_passing_are_star_attention() -> None:
    """Star: every block sees the first block and itself (star_attention/model.py:180-235)."""
    config = ApbConfig(block=60, anchor=60, passing=0)
    layout = layout_of(config)
    sequence = random_sequence(layout)
    seen = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    seen[120:180, 60:120] = False
    wanted = oracle.attend(sequence, seen.expand(2, -1, -1), SCALE)
    assert float((attend_on_rank(None, sequence, layout, config) - wanted).abs().max()) < TOLERANCE


def test_every_question_row_sees_the_whole_context() -> None:
    """The papers' code hides the tail of other ranks' blocks from all but the question's last row."""
    config = ApbConfig(block=30, anchor=5, passing=0)
    layout = layout_of(config)
    sequence = random_sequence(layout)
    found = attend_on_rank(None, sequence, layout, config)[-QUESTION:]
    assert float((found - dense_causal(sequence)[-QUESTION:]).abs().max()) < TOLERANCE


def test_order_of_passing_tokens_changes_nothing() -> None:
    config = CONFIGS["few blocks"]
    layout = layout_of(config)
    sequence = random_sequence(layout)
    before = attend_on_rank(None, sequence, layout, config)

    def backwards(scores: torch.Tensor, candidates: Candidates) -> torch.Tensor:
        return torch.cat([part.flip(0) for part in KERNELS.select(scores, candidates).split(candidates.num_passing)])

    after = attend_on_rank(None, sequence, layout, config, kernels=replace(KERNELS, select=backwards))
    assert torch.allclose(after, before, atol=TOLERANCE)


def test_a_partial_without_keys_changes_nothing() -> None:
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    some, none = (
        attend(q, k, v, 1.0)
        for attend in SdpaEngine().plan([[Piece(5, Span(0, 5), causal=True)], [Piece(5, Span(0, 0))]])
    )
    out, lse = torch.empty_like(some.out), torch.empty_like(some.lse)
    KERNELS.merge((none.out, some.out, none.out), (none.lse, some.lse, none.lse), out, lse)
    assert torch.allclose(out, some.out, atol=TOLERANCE) and torch.allclose(lse, some.lse, atol=TOLERANCE)
    KERNELS.merge((none.out, none.out), (none.lse, none.lse), out, lse)
    assert torch.all(out == 0) and torch.all(lse == -torch.inf)


def test_merge_survives_scores_that_overflow_an_exponential() -> None:
    big, small = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    out = torch.empty_like(big)
    KERNELS.merge((small, big), (torch.tensor([[-500.0]]), torch.tensor([[500.0]])), out)
    assert torch.equal(out, big)


def test_a_causal_piece_must_be_square() -> None:
    with pytest.raises(ValueError, match="as many queries as keys, not 5 and 7"):
        Piece(5, Span(3, 10), causal=True)


class TestGuards:
    """Each test above would be worthless if it passed with the thing it guards broken: break it, and look."""

    def test_a_dropped_passing_block_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        add = SparseAttention._add_shared

        def drop(self: SparseAttention, layer: LayerRows, shared: Shared, *args: Any) -> None:
            start = self.layout.num_anchor_keys(self.layout.num_blocks - 1)
            shared.keys_values[start : start + self.layout.num_passing(0), 1] = 0
            add(self, layer, shared, *args)

        monkeypatch.setattr(SparseAttention, "_add_shared", drop)
        assert error_on_one_rank(CONFIGS["few blocks"]) > 100 * TOLERANCE

    def test_a_doubled_anchor_key_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Layout, "candidates", lambda self, block: self.blocks[block])
        config = ApbConfig(passing="all", anchor=30, block=36)
        layout = layout_of(config)
        sequence = random_sequence(layout)
        found = attend_on_rank(None, sequence, layout, config)
        assert float((found - dense_causal(sequence)).abs().max()) > 100 * TOLERANCE

    def test_natural_logarithms_taken_for_base_2_are_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch's kernels give the one, FlashInfer's the other."""
        monkeypatch.setattr(sdpa, "LOG2_E", 1.0)
        assert error_on_one_rank(CONFIGS["few blocks"]) > 100 * TOLERANCE

    def test_bottom_right_causal_on_the_question_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What flash-attn does with causal=True and fewer queries than keys: rows lose the block's tail."""
        start_question = SparseAttention._start_question

        def hide_tail(self: SparseAttention, layer: LayerRows, k: torch.Tensor, v: torch.Tensor) -> Any:
            return start_question(self, layer, k[: 1 - QUESTION], v[: 1 - QUESTION])

        monkeypatch.setattr(SparseAttention, "_start_question", hide_tail)
        assert error_on_one_rank(CONFIGS["few blocks"]) > 100 * TOLERANCE

    def test_a_round_that_loses_what_was_handed_on_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pop = dict.pop

        class Forgetful(dict[int, Shared]):
            def pop(self, number: int) -> Shared:  # type: ignore[override]
                shared = pop(self, number)
                return Shared(torch.zeros_like(shared.keys_values), shared.scores)

        monkeypatch.setattr(HandedOn, "__init__", lambda self: self.__dict__.update(num_tokens=0, layers=Forgetful()))
        assert error_of_rounds(RankGroup(), CONFIGS["few blocks"], 0, 45) > 100 * TOLERANCE
