"""The split of a prompt: every token has one owner, no key is seen twice, borders stand still."""

from __future__ import annotations

import itertools

import pytest

from sglang_apb.config import ApbConfig, ConfigError, parse
from sglang_apb.layout import LayoutError, num_rows, plan
from sglang_apb.rounds import rounds_of

CONFIGS = [
    ApbConfig(),
    ApbConfig(block=256),
    ApbConfig(block=205, anchor=7, passing=3),
    ApbConfig(block=100, anchor=100, passing=0),
    ApbConfig(anchor=900, passing=11),
    ApbConfig(block=300, passing="all"),
    ApbConfig(block=300, anchor_mode="recomputed", order="two_pass"),
    parse("paper"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_tokens", [7, 300, 1025, 4096])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("page_size", [1, 4])
def test_every_token_and_page_has_one_owner(config: ApbConfig, num_tokens: int, num_ranks: int, page_size: int) -> None:
    layout = plan(num_tokens, config, num_ranks=num_ranks, page_size=page_size)
    tokens = list(range(layout.context_end, num_tokens))
    for rank in range(num_ranks):
        for span in layout.rows_of(rank).block_tokens.values():
            tokens += range(span.start, span.end)
    assert sorted(tokens) == list(range(num_tokens))
    pages = itertools.chain.from_iterable(
        range(*pages) for rank in range(num_ranks) for pages in layout.owned_pages(rank, page_size)
    )
    assert sorted(pages) == list(range(-(-num_tokens // page_size)))


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_are_anchor_blocks_question_without_gaps(config: ApbConfig) -> None:
    layout = plan(2000, config, num_ranks=3)
    for rank in range(3):
        rows = layout.rows_of(rank)
        spans = [rows.anchor, *rows.blocks.values(), rows.question]
        assert spans[0].start == 0
        assert all(a.end == b.start for a, b in itertools.pairwise(spans))
        assert sum(map(len, rows.tokens)) == sum(map(len, rows.positions)) == spans[-1].end


def test_borders_stand_still_when_the_prompt_grows() -> None:
    layout, longer = plan(131072, ApbConfig()), plan(524288, ApbConfig())
    assert layout.blocks[:-1] == longer.blocks[: layout.num_blocks - 1]
    assert layout.owners == longer.owners[: layout.num_blocks]
    assert (layout.num_blocks, len(layout.blocks[0]), layout.anchor, layout.passing) == (128, 1024, 512, 128)
    assert len(layout.question) == 256 and len(plan(600, ApbConfig()).question) == 150
    assert layout.first_bounded_period is None and max(longer.num_staying) == 16384
    # The work that the design's budget counts with.
    assert 0.13 < layout.attention_share < 0.15 and 0.05 < longer.attention_share < 0.07
    assert plan(524288, ApbConfig(passing="all")).first_bounded_period is None


def test_the_papers_lengths_follow_the_prompt() -> None:
    layout, paper = plan(131072, parse("paper")), parse("paper")
    assert (layout.anchor, layout.passing, layout.num_blocks, layout.recomputed) == (2048, 1024, 16, True)
    assert plan(524288, paper).anchor == 8192 and plan(524288, paper).first_bounded_period is None
    assert [plan(n, paper).num_blocks for n in (600, 2048, 4096, 7168, 16384)] == [1, 3, 7, 13, 16]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_have_as_much_to_do_in_all_and_in_every_round(num_ranks: int) -> None:
    whole = plan(65536 + 256, ApbConfig(), num_ranks=num_ranks)
    assert len({sum(whole.blocks_of(rank)) for rank in range(num_ranks)}) == 1, "work with what was handed on"
    rounds, start = rounds_of(whole, 2048), 0
    while (end := rounds.end_of(start)) is not None:
        layout = plan(65536 + 256, ApbConfig(), num_ranks=num_ranks, num_cached=start, round_end=end)
        assert [num_rows(layout.rows_of(rank).tokens) for rank in range(num_ranks)] == [2048] * num_ranks
        start = end
    assert start == 65536 - 2048 * num_ranks


@pytest.mark.parametrize(
    ("start", "end"), [(0, 400), (1, 600), (200, 600), (399, 800), (400, 800), (799, None), (800, None)]
)
def test_a_round_ends_on_a_unit(start: int, end: int | None) -> None:
    """Of two ranks with blocks of 100 tokens; what a cached beginning leaves of its last unit comes on top."""
    layout = plan(1250, ApbConfig(block=100, anchor=30, question_tokens=250), num_ranks=2)
    assert rounds_of(layout, 250).end_of(start) == end


def test_the_first_round_has_the_whole_anchor() -> None:
    layout = plan(1250, ApbConfig(block=100, anchor=450, question_tokens=250), num_ranks=2)
    assert rounds_of(layout, 1).end_of(0) == 600


def test_a_key_is_anchor_or_candidate_never_both() -> None:
    for anchor in (0, 10, 100, 250, 1000):
        layout = plan(1100, ApbConfig(block=100, anchor=anchor, question_tokens=100))
        for block in range(layout.num_blocks):
            candidates = layout.candidates(block)
            assert candidates.start >= min(anchor, candidates.end)
            assert layout.num_anchor_keys(block) <= layout.blocks[block].start


def test_question_that_leaves_no_context_is_refused_with_the_numbers() -> None:
    with pytest.raises(LayoutError, match="question_tokens=64 leaves no context in a prompt of 64 tokens"):
        plan(64, ApbConfig(), question_tokens=64)
    with pytest.raises(LayoutError, match="give at most 48"):
        plan(64, ApbConfig(), page_size=16, question_tokens=50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "not valid JSON"),
        ('{"passing": "all", "max_passing": 5}', 'passing="all" hands everything on, max_passing=5 not'),
        ("[1]", "neither a JSON object, nor a preset"),
        ('{"anchors": 3}', "unknown option 'anchors'.*known: block, anchor"),
        ('{"anchor": -1}', "anchor must be a whole number of at least 0, not -1"),
        ('{"anchor": true}', "anchor must be a whole number"),
        ('{"passing": "some"}', 'passing must be a whole number of at least 0 or "all"'),
        ('{"block": 0}', "block must be a whole number of at least 1, not 0"),
        ('{"num_blocks": 16}', "unknown option 'num_blocks'.*known: block, anchor"),
        ('{"selector": "best"}', "selector must be one of query"),
        ('{"round_tokens": 0}', "round_tokens must be a whole number of at least 1, not 0"),
        ('{"between_rounds": -1}', "between_rounds must be a whole number of at least 0, not -1"),
        ('{"order": "two_pass"}', 'add anchor_mode="recomputed"'),
        ("/no/such/file", r"neither a JSON object, nor a preset \(paper\), nor a readable file"),
    ],
)
def test_bad_configuration_is_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_configuration_from_a_file(tmp_path: object) -> None:
    path = tmp_path / "apb.json"  # type: ignore[operator]
    path.write_text('{"block": 4, "anchor": null}')
    assert parse(str(path)) == ApbConfig(block=4), "what is null is left out"
