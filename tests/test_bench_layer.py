"""`sglang-apb bench kernels` and `bench layer`: what they count, project and say, on a CPU and two ranks of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_apb.patches import row_chunks
from torch.nn.functional import linear, silu

from sglang_apb import attention, cli, selection
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import calls as bench_calls
from sglang_apb.commands.bench import decoder as bench_decoder
from sglang_apb.commands.bench import layer as bench_layer
from sglang_apb.commands.bench import link as bench_link
from sglang_apb.commands.bench import observed as bench_observed
from sglang_apb.commands.bench import one_call as bench_one_call
from sglang_apb.commands.bench import parts as bench_parts
from sglang_apb.commands.bench import ranks as bench_ranks
from sglang_apb.commands.bench import row_ops as bench_row_ops
from sglang_apb.commands.bench import timing as bench_timing
from sglang_apb.commands.bench.layer import Column
from sglang_apb.commands.bench.link import Link
from sglang_apb.commands.bench.models import DecoderShape
from sglang_apb.commands.bench.one_call import PageTable
from sglang_apb.commands.bench.parts import APB, EXACT, OTHER, PROJECTED, LayerTime
from sglang_apb.commands.bench.setup import InProcess
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Span, num_rows, plan
from sglang_apb.rank_group import RankGroup

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 10,
}
SHAPE = DecoderShape.of(SMALL)
assert SHAPE is not None
# Two blocks of 3 tokens and a question of 2. Block 0 hands 1 of its 2 tokens outside the anchor on.
SIX_AND_TWO = ApbConfig(block=3, anchor=1, passing=1, question_tokens=2)
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores would make tiny work slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setting(config: ApbConfig = SIX_AND_TWO) -> InProcess:
    assert SHAPE is not None
    return InProcess(SHAPE, config, "torch", "cpu", torch.float32, repeats=2, warm_up=1, seed=0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path / "model")


# what is counted


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "config",
    [ApbConfig(block=31, anchor=50, passing=9), ApbConfig(block=39, anchor=30, anchor_mode="recomputed")],
    ids=["shared", "recomputed"],
)
def test_pairs_of_all_ranks_are_the_layouts(config: ApbConfig, num_ranks: int) -> None:
    layout = plan(203, config, num_ranks=num_ranks)
    assert sum(bench_observed.rank_pairs(layout, rank) for rank in range(num_ranks)) == layout.attention_pairs


def test_calls_of_a_layer_counted_by_hand() -> None:
    layout = plan(8, SIX_AND_TWO)
    cases = {case.name: case for case in bench_calls.layer_cases(bench_calls.layer_calls(setting(), layout, 0))}
    # 4 operations for each pair, of 4 heads and 8 numbers: 128 a pair.
    assert {name: case.flop // 128 for name, case in cases.items() if case.flop} == {
        "own blocks": 6 + 6,
        "before": 3 * (1 + 1),  # block 1: the anchor, and block 0's token
        "question": 2 * 6,
        "question itself": 3,
    }
    # A row of keys, or of values, is 2 heads * 8 numbers * 4 bytes = 64 bytes, one of queries or results 128.
    assert {name: case.num_bytes for name, case in cases.items() if case.num_bytes} == {
        "scores": 2 * 64 + 2 * 2 * 4,  # of block 0: the last one hands nothing on
        "select": 2 * 2 * 4 + 2 * 4,
        "pack": 2 * 4 + 2 * (64 + 64),
        "merge of 2, 2 rows": 3 * (2 * 128) + 2 * (2 * 4 * 4),
        "merge of 2, 3 rows": 3 * (3 * 128) + 2 * (3 * 4 * 4),
    }
    gathered = bench_calls.gather_case(setting(), layout, 0, attention.create("torch"))
    assert gathered.num_bytes == 2 * 6 * (64 + 64)


def test_calls_of_all_ranks_have_the_layouts_pairs() -> None:
    config = ApbConfig(block=31, anchor=50, passing=9)
    layout = plan(203, config, num_ranks=2)
    flop = sum(
        case.flop
        for rank in range(2)
        for case in bench_calls.layer_cases(bench_calls.layer_calls(setting(config), layout, rank))
    )
    assert flop == layout.attention_pairs * 4 * 4 * 8


# one call in place of two


class PretendedFlashInfer:
    """`BatchPrefillWithPagedKVCacheWrapper` as its documentation describes it, in plain PyTorch."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD" and workspace.dtype == torch.uint8

    def plan(self, **arguments: Any) -> None:
        self.planned = SimpleNamespace(**arguments)

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> None:
        p = self.planned
        assert p.causal and q.shape[0] == p.qo_indptr[-1] and pages[0].shape[1] == p.page_size
        for block, last in enumerate(p.paged_kv_last_page_len.tolist()):
            rows = slice(p.qo_indptr[block], p.qo_indptr[block + 1])
            index = p.paged_kv_indices[p.paged_kv_indptr[block] : p.paged_kv_indptr[block + 1]].long()
            num_keys = (len(index) - 1) * p.page_size + last
            group = p.num_qo_heads // p.num_kv_heads
            k, v = (x[index].flatten(0, 1)[:num_keys].repeat_interleave(group, dim=1) for x in pages)
            logits = p.sm_scale * torch.einsum("qhd,khd->hqk", q[rows], k)
            num_queries = logits.shape[1]
            seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
            out[rows] = torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def borders_of(calls: bench_calls.LayerCalls) -> list[int]:
    """Where pages must begin or end in the buffer."""
    num_shared = calls.of("before")[0].args[1].shape[0]
    return [64, num_shared, *(number for span, prefix in calls.block_rows for number in (span.start, prefix))]


@pytest.mark.parametrize(
    "config",
    [
        ApbConfig(block=32, anchor=16, passing=16, question_tokens=11),
        ApbConfig(block=31, anchor=50, passing=9),
        ApbConfig(block=39, anchor=30, passing=6, anchor_mode="recomputed"),
    ],
    ids=["aligned", "odd lengths", "recomputed"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_paged_call_sees_what_two_calls_and_a_merge_see(
    config: ApbConfig, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PretendedFlashInfer)
    monkeypatch.setitem(sys.modules, "flashinfer", pretended)
    layout = plan(203, config, num_ranks=2)
    calls = bench_calls.layer_calls(setting(config), layout, rank)
    cases, note = bench_one_call.one_call_cases(calls)
    assert cases[1].name == f"one call, pages of {math.gcd(*borders_of(calls))}"
    assert float(note.rpartition(" ")[2]) < TOLERANCE
    assert cases[1].flop == bench_calls.context_case(calls).flop

    monkeypatch.setattr(type(layout), "num_shared_keys", lambda layout, block: 0)
    assert float(bench_one_call.one_call_cases(calls)[1].rpartition(" ")[2]) > 100 * TOLERANCE, "nothing in front"


def test_a_page_table_by_hand() -> None:
    table = PageTable.of([(Span(0, 8), 0), (Span(8, 14), 4)], num_shared=12)
    assert (table.page_size, table.num_rows) == (4, 28)
    assert table.query_offsets.tolist() == [0, 8, 14]
    assert table.page_offsets.tolist() == [0, 2, 5]
    assert table.pages.tolist() == [3, 4, 0, 5, 6]
    assert table.last_page_lengths.tolist() == [4, 2]
    assert table.pages.dtype == torch.int32


# observing


def test_observing_changes_nothing_and_shows_every_part() -> None:
    config = ApbConfig(block=31, anchor=50, passing=9)
    layout = plan(203, config, num_ranks=1)
    engine, selector = attention.create("torch"), selection.create("query")
    rows = bench_calls.random_rows(setting(), num_rows(layout.rows_of(0).tokens))
    plain = SparseAttention(layout, RankGroup(), engine, selector, "cpu").attend(rows)
    calls = bench_calls.LayerCalls(layout, 0, engine)
    shown = bench_observed.ObservedSelector(selector, engine.kernels, calls)
    group = bench_observed.ObservedGroup(RankGroup(), calls)
    observed = SparseAttention(layout, group, bench_observed.ObservedEngine(engine, calls), shown, "cpu").attend(rows)
    assert torch.equal(plain, observed)
    counted = {name for names in bench_parts.PARTS.values() for name in names}
    assert {call.part for call in calls.calls} == counted - {"projections", "RoPE and norms", "KV cache", "FFN"}


def test_parts_are_summed_and_the_median_run_counts() -> None:
    moments = iter([0.0, 1.0, 1.0, 3.0, 10.0, 11.0, 11.0, 12.0])
    clock = bench_timing.Clock("cpu")
    clock.now = lambda: next(moments)  # type: ignore[method-assign]
    recorder = bench_timing.Recorder(clock)

    def run() -> None:
        recorder("a", lambda: None)
        recorder("a", lambda: None)

    assert bench_timing.Stopwatch(clock, repeats=2, warm_up=0).median_parts(run, recorder) == {"a": (3.0 + 2.0) / 2}


# the layer


def test_the_layer_is_a_decoders() -> None:
    """Against the formulas written out, with the FFN's rows in several chunks."""
    layer = bench_decoder.DecoderLayer(setting(), 5, 1, lambda x: None)
    hidden, residual = torch.randn(2, 5, 16)
    rotation = bench_row_ops.row_ops("torch").rotation(torch.arange(5), 8, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "CHUNK_ROWS", 2)
        out, summed = layer(hidden, residual, rotation, lambda rows: rows.q, bench_timing.unobserved)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    q = linear(norm(hidden + residual), layer._qkv)[:, :32].view(5, 4, 8)
    turns = torch.polar(torch.ones(5, 4), torch.arange(5)[:, None] * 500000.0 ** (-torch.arange(0, 8, 2) / 8))
    turned = torch.complex(q[..., :4], q[..., 4:]) * turns[:, None]
    attended = linear(torch.cat((turned.real, turned.imag), dim=-1).flatten(1), layer._o)
    middle = hidden + residual + attended
    gate, up = linear(norm(middle), layer._gate_up).chunk(2, dim=-1)
    assert torch.allclose(summed, middle, atol=1e-5)
    assert torch.allclose(out, linear(silu(gate) * up, layer._down), atol=1e-5)


def test_a_share_has_its_heads_and_columns() -> None:
    assert SHAPE is not None
    whole, half, quarter = (bench_decoder.DecoderLayer(setting(), 5, shares, lambda x: None) for shares in (1, 2, 4))
    assert [layer._qkv.shape[0] for layer in (whole, half, quarter)] == [8 * 8, 8 * 4, 8 * 3]
    assert [layer._down.shape[1] for layer in (whole, half, quarter)] == [32, 16, 8]
    assert bench_decoder.why_not_shared(SHAPE, 4) is None
    assert bench_decoder.why_not_shared(SHAPE, 8) == "4 query heads do not divide over 8 ranks"


ALL_HAVE = ("projections", "RoPE and norms", "KV cache", "communication", "attention, own", "FFN")
# What a rank lacks whose only block is the first, or the last: which rank is the slowest differs from run to run.
NOT_IN_EVERY_BLOCK = {"scores and selection", "packing", "attention, before"}


def check_parts(time: LayerTime, method: str, *also: str, one_block: bool = False) -> None:
    """The parts are what a method has, and add up to the layer."""
    lacking = NOT_IN_EVERY_BLOCK - time.parts.keys() if one_block else set()
    expected = [part for part in bench_parts.PARTS if (method == APB or part in ALL_HAVE) and part not in lacking]
    assert list(time.parts) == [*expected, *also, OTHER]
    assert sum(time.parts.values()) == pytest.approx(time.layer)
    assert all(seconds >= 0 for part, seconds in time.parts.items() if part != OTHER)
    assert time.prefill(2) == pytest.approx(2 * time.layer + time.lm_head)


def test_parts_on_one_rank_add_up_to_the_layer() -> None:
    config = ApbConfig(block=142, anchor=128, passing=128, question_tokens=32)
    apb, exact = bench_parts.together(None, setting(config), [(APB, 600), (EXACT, 600)])
    check_parts(apb, APB)
    check_parts(exact, EXACT)
    assert not apb.is_projected and not exact.is_projected


def _fails_on_rank_one(group: Any) -> int:
    assert RankGroup(group).rank == 0, "deliberate"
    return 0


def test_two_ranks_really_run_together_and_measure_their_link(model: str, tmp_path: Path) -> None:
    output = tmp_path / "layer.json"
    options = ["--prefill-backend-config", '{"block": 142, "anchor": 128, "question_tokens": 32}', "--repeats", "2"]
    command = ["bench", "layer", "--model", model, "--lengths", "600", "--ranks", "2,4", "--measure-link"]
    assert cli.main([*command, *options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    link = Link(result["settings"]["link_gb_s"], result["settings"]["link_latency_us"])
    assert link.gb_per_s > 0 and link != Link()
    rows = {(row["method"], row["ranks"]): row for row in result["results"]}
    for method in (APB, EXACT):
        time = LayerTime(**rows[method, 2]["time"])
        check_parts(time, method)
        assert not time.is_projected and time.parts["communication"] > 0
        check_parts(LayerTime(**rows[method, 4]["time"]), method, PROJECTED, one_block=True)
    projected = rows[EXACT, 4]["time"]["parts"][PROJECTED]
    assert projected == pytest.approx(bench_link.exact_exposed(600, 16, 4, 4, link))


def test_a_failing_rank_is_an_error() -> None:
    with pytest.raises(CommandError, match=r"a rank failed(.|\n)*deliberate"):
        bench_ranks.run_ranks(2, "cpu", _fails_on_rank_one)


def test_what_does_not_fit_is_said_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = bench_parts.alone

    def small_memory(setting: InProcess, method: str, *rest: Any) -> LayerTime:
        if method == EXACT:
            raise torch.OutOfMemoryError("trace\nCUDA out of memory.")
        return alone(setting, method, *rest)

    monkeypatch.setattr(bench_parts, "alone", small_memory)
    apb, exact = bench_layer.time_ranks(setting(), [8], 4, Link())
    assert apb.time is not None and exact.time is None and exact.reason == "CUDA out of memory."
    assert "trace" in capsys.readouterr().err
    assert "- exact, 4 ranks, 8 tokens: CUDA out of memory." in bench_layer.describe([apb, exact], 2, Link())

    monkeypatch.setattr(bench_parts, "together", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    assert [column.reason for column in bench_layer.time_ranks(setting(), [8], 1, Link())] == ["none left"] * 2


# projections


def test_links_by_hand() -> None:
    link = Link(gb_per_s=2.0, latency_us=100.0)
    assert link.seconds(10**6) == pytest.approx(100e-6 + 500e-6)
    assert bench_link.all_reduce_bytes(800, 4) == 1200
    # 8 rows * 16 numbers * 4 bytes, three quarters of them twice, and that two times a layer.
    assert bench_link.exact_exposed(8, 16, 4, 4, link) == pytest.approx(2 * (100e-6 + 768 / 2e9))


def test_a_link_goes_through_both_measurements() -> None:
    link = Link.fitted((10**6, 600e-6), (3 * 10**6, 1600e-6))
    assert (link.gb_per_s, link.latency_us) == (pytest.approx(2.0), pytest.approx(100.0))
    assert Link.fitted((10**6, 1e-3), (2 * 10**6, 4e-3)) == Link(gb_per_s=0.5, latency_us=0.0), "less than no latency"
    assert Link.fitted((10**6, 1e-3), (2 * 10**6, 1e-3)) == Link(gb_per_s=2.0, latency_us=0.0), "no slope"


def test_only_what_attention_does_not_hide_is_waited_for() -> None:
    link = Link(gb_per_s=1.0, latency_us=0.0)
    received = [10**6, 2 * 10**6, 10**6]  # 1 ms and 2 ms handed on, 1 ms of the question
    assert bench_link.apb_exposed(received, own=0.0, before=0.0, link=link) == pytest.approx(4e-3)
    assert bench_link.apb_exposed(received, own=2.5e-3, before=0.2e-3, link=link) == pytest.approx(0.5e-3 + 0.8e-3)
    assert bench_link.apb_exposed(received, own=1.0, before=1.0, link=link) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_receives_is_counted(rank: int) -> None:
    layout = plan(8, SIX_AND_TWO, num_ranks=2)
    group = bench_observed.ObservedGroup(bench_observed.StandInGroup(rank, 2), bench_timing.unobserved)
    sparse = SparseAttention(layout, group, attention.create("torch"), selection.create("query"), "cpu")
    out = sparse.attend(bench_calls.random_rows(setting(), num_rows(layout.rows_of(rank).tokens)))
    assert torch.isfinite(out).all()
    # K and V of a token are 128 bytes. Anchor 1 token, the other rank's most 1; the question's 2 rows, 4 heads, 8 + 4.
    assert group.received == [128, 128, 2 * 4 * 12 * 4]


def test_what_a_network_costs_is_said() -> None:
    """125 MB handed on take a second at 1 Gbit/s, half of which own attention hides, and 10 ms at 100 Gbit/s."""
    parts = {"attention, own": 0.5, "attention, before": 1.0}
    time = LayerTime(0, 2.0, parts | {PROJECTED: 0.0, OTHER: 0.5}, 0.1, (125 * 10**6, 0))
    (note,) = (note for note in bench_layer.notes([bench_layer.Column("apb", 4, 8, time)], 2, Link()) if "MB" in note)
    assert note.startswith("apb, 4 ranks (projected), 8 tokens, over a network: 125.0 MB come to a rank a layer")
    assert "500.027 ms at 1 Gbit/s, 0.000 ms at 10 Gbit/s" in note


def test_a_share_alone_gets_the_projection_on_top() -> None:
    config = ApbConfig(block=71, anchor=128, passing=64, question_tokens=32)
    slow = Link(gb_per_s=0.001, latency_us=0.0)
    for method in (APB, EXACT):
        time = bench_parts.alone(setting(config), method, 600, 1, 4, slow)
        check_parts(time, method, PROJECTED)
        assert time.is_projected
    assert time.parts[PROJECTED] == pytest.approx(bench_link.exact_exposed(600, 16, 4, 4, slow))


# the commands


def test_kernels_command_prints_writes_and_draws(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "results" / "kernels.json", tmp_path / "kernels.png"
    options = ["--lengths", "700,600", "--repeats", "2", "--warm-up", "1", "--prefill-backend-config", '{"block": 99}']
    command = ["bench", "kernels", "--model", model, *options, "--output", str(output), "--plot", str(picture)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "| own blocks + before + merge" in printed and "TFLOP/s" in printed and "100% is" in printed
    result = json.loads(output.read_text())
    assert result["model"] == "model" and result["settings"]["ranks"] == 2
    assert result["ceilings"]["flop_per_s"] > 0 and result["ceilings"]["bytes_per_s"] > 0
    assert list(dict.fromkeys(row["length"] for row in result["results"])) == [600, 700]
    for row in result["results"]:
        ceiling = result["ceilings"]["flop_per_s"] if row["flop"] else result["ceilings"]["bytes_per_s"]
        assert row["share_of_ceiling"] == pytest.approx((row["flop"] or row["num_bytes"]) / row["seconds"] / ceiling)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_layer_command_marks_what_is_projected(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "layer.json", tmp_path / "layer.png"
    options = ["--lengths", "600", "--ranks", "1,4,8", "--repeats", "1", "--warm-up", "0", "--link-gb-s", "50"]
    command = ["bench", "layer", "--model", model, *options, "--output", str(output), "--plot", str(picture)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "apb, 8 ranks (projected)" in printed and "apb, 1 rank " in printed and "50 GB/s" in printed
    assert "- exact, 8 ranks, 600 tokens: 4 query heads do not divide over 8 ranks" in printed
    result = json.loads(output.read_text())
    by_name = {row["name"]: row for row in result["results"]}
    assert {name: row["projected"] for name, row in by_name.items()} == {
        "apb, 1 rank": False,
        "exact, 1 rank": False,
        "apb, 4 ranks (projected)": True,
        "exact, 4 ranks (projected)": True,
        "apb, 8 ranks (projected)": True,
        "exact, 8 ranks": None,
    }
    for row in result["results"]:
        if row["time"]:
            assert row["prefill_s"] == pytest.approx(2 * row["time"]["layer"] + row["time"]["lm_head"])
            assert sum(row["time"]["parts"].values()) == pytest.approx(row["time"]["layer"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_a_part_and_a_column_a_method() -> None:
    apb = LayerTime(1, 0.010, {"projections": 0.004, "FFN": 0.005, PROJECTED: 0.002, OTHER: -0.001}, 0.001)
    columns = [Column("apb", 4, 64, apb), Column("exact", 4, 64, reason="no")]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in bench_layer.layer_table(columns, 64, 2).splitlines()
    ]
    assert cells[0] == ["ms, 64 tokens", "apb, 4 ranks (projected)", "exact, 4 ranks"]
    assert cells[2:] == [
        ["projections", "4.000", "-"],
        ["FFN", "5.000", "-"],
        ["communication, projected", "2.000", "-"],
        ["other", "-1.000", "-"],
        ["whole layer", "10.000", "-"],
        ["output layer", "1.000", "-"],
        ["prefill, 2 layers (estimate)", "21.000", "-"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer", "--link-gb-s", "0"], "--link-gb-s must be above 0"),
        (["layer", "--warm-up", "-1"], "--warm-up must be at least 0"),
        (["layer", "--lengths", "1"], "--lengths 1: question_tokens=1 leaves no context"),
        (["kernels", "--rank", "2"], "--rank must be from 0 to 1, not 2"),
        (["kernels", "--plot", "picture.txt"], "must end in one of .png"),
        (["kernels", "--prefill-backend-config", '{"bloc": 3}'], "unknown option 'bloc'"),
        (
            ["kernels", "--prefill-backend-config", '{"order": "two_pass", "anchor_mode": "recomputed"}'],
            "is not measured here",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", options[0], "--model", model, *options[1:]]) == 1
    assert message in capsys.readouterr().err
