"""What the FlashInfer engine tells FlashInfer, on any machine: the wrappers' documented meaning, in plain PyTorch.

Whether FlashInfer's kernels do what its documentation says is for `pytest -m gpu` (tests/test_gpu.py).
"""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_apb.kernels import REFERENCE
from test_sparse_attention import (
    CONFIGS,
    SCALE,
    TOLERANCE,
    LayerRows,
    expected,
    layout_of,
    local_rows,
    random_sequence,
)

from sglang_apb import selection
from sglang_apb.attention import flashinfer as engine_module
from sglang_apb.attention.base import Piece
from sglang_apb.backends import sparse_attention
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Span
from sglang_apb.rank_group import RankGroup


class Wrapper:
    """flashinfer/prefill.py, Batch*Wrapper.plan and run: requests of consecutive queries, each with its keys."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD" and workspace.dtype == torch.uint8
        self.num_plans = 0

    def plan(self, **arguments: Any) -> None:
        host = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        assert all(value.dtype == torch.int32 and value.device.type == "cpu" for value in host)
        self.arguments = SimpleNamespace(**arguments)
        self.num_plans += 1

    def _run(self, q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], out: Any, lse: Any) -> None:
        plan = self.arguments
        assert q.shape[0] == plan.qo_indptr[-1] and len(keys) == len(plan.qo_indptr) - 1
        group = plan.num_qo_heads // plan.num_kv_heads
        for (k, v), start, end in zip(keys, plan.qo_indptr[:-1], plan.qo_indptr[1:], strict=True):
            rows = q[start:end]
            logits = plan.sm_scale * torch.einsum("qhd,khd->hqk", rows, k.repeat_interleave(group, dim=1))
            if plan.causal:  # aligned at the end
                hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(rows))
                logits = logits.masked_fill(hidden, -torch.inf)
            out[start:end] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.repeat_interleave(group, dim=1))
            lse[start:end] = logits.logsumexp(-1).T / math.log(2)


class Ragged(Wrapper):
    def run(self, q: Any, k: Any, v: Any, *, out: Any, lse: Any, return_lse: bool) -> None:
        offsets = self.arguments.kv_indptr
        assert return_lse and k.shape[0] == v.shape[0] == offsets[-1]
        keys = [(k[start:end], v[start:end]) for start, end in itertools.pairwise(offsets)]
        self._run(q, keys, out, lse)


def single_prefill(q: Any, k: Any, v: Any, *, sm_scale: float, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer/prefill.py, single_prefill_with_kv_cache: all queries see all keys."""
    assert return_lse
    group = q.shape[1] // k.shape[1]
    logits = sm_scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.repeat_interleave(group, dim=1))
    return out, logits.logsumexp(-1).T / math.log(2)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> engine_module.FlashInferEngine:
    stand_in = SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Ragged, single_prefill_with_kv_cache=single_prefill)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer.cascade", SimpleNamespace(get_cascade_module=lambda: None))
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(engine_module, "num_multiprocessors", lambda device: 36)
    monkeypatch.setattr(engine_module, "QUERIES_A_BLOCK", 8)
    created = engine_module.FlashInferEngine()
    created.kernels = REFERENCE
    return created


def error(engine: engine_module.FlashInferEngine, config: ApbConfig, num_layers: int = 1) -> float:
    layout = layout_of(config)
    attention = SparseAttention(layout, RankGroup(), engine, selection.create(config.selector), "cpu")
    worst = 0.0
    for seed in range(num_layers):
        sequence = random_sequence(layout, seed=seed)
        index = local_rows(layout, 0)
        found = attention.attend(LayerRows(sequence.q[index], sequence.k[index], sequence.v[index], SCALE))
        worst = max(worst, float((found - expected(sequence, layout, config)).abs().max()))
    return worst


ONE_PASS = {name: config for name, config in CONFIGS.items() if config.order == "one_pass"}


@pytest.mark.parametrize("blocks", ["together", "one by one"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_a_layer_equals_the_oracle(
    name: str, blocks: str, engine: engine_module.FlashInferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "one by one":
        monkeypatch.setattr(sparse_attention, "QUERIES_A_CALL", 1)
    assert error(engine, ONE_PASS[name], num_layers=2) < TOLERANCE


def test_plans_are_made_once_a_prompt_and_wrappers_once_at_all(engine: engine_module.FlashInferEngine) -> None:
    for num_prompts in (1, 2):
        assert error(engine, CONFIGS["few blocks"], num_layers=3) < TOLERANCE
        plans = [wrapper.flashinfer.num_plans for wrapper in engine._wrappers.values()]
        assert plans == [num_prompts] * 4  # own blocks, the question twice, what was handed on


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "num_heads", "parts"),
    [(256, 131072, 32, 4), (256, 131072, 64, 1), (256, 131072, 9, 8), (8176, 17408, 32, 1), (512, 2048, 32, 1)],
)
def test_keys_of_few_queries_are_cut_so_that_a_gpu_is_busy(
    num_queries: int, num_keys: int, num_heads: int, parts: int
) -> None:
    """On an H100's 132 multiprocessors; never more parts than keys."""
    assert engine_module._num_parts(Piece(num_queries, Span(0, num_keys)), num_heads, 132) == parts
    assert engine_module._num_parts(Piece(num_queries, Span(0, 2)), num_heads, 132) <= 2
    assert engine_module._num_parts(Piece(num_queries, Span(0, 0)), num_heads, 132) == 1


def test_each_way_is_run_once_before_a_prompt_comes(
    engine: engine_module.FlashInferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a prompt calls for: each of FlashInfer's modules, and merging of every number of parts there can be."""
    ways: list[tuple[str, int]] = []
    made = engine._attention

    def note(*arguments: Any) -> Any:
        attention = made(*arguments)
        ways.append((type(attention).__name__, getattr(attention, "num_parts", 1)))
        return attention

    monkeypatch.setattr(engine, "_attention", note)
    builds = list(engine.builds(6, 2, 16, torch.float32, "cpu"))
    for build in builds:
        build.run()
    # On 36 multiprocessors, 8 queries of 6 heads are 6 thread blocks: 16 queries are 12, 24 are 18, and 32 enough.
    possible = {engine_module._num_parts(Piece(n, Span(0, 4096)), 6, 36) for n in range(1, 100)}
    assert possible == {1, 4, 6, 8}
    assert set(ways) == {("_Causal", 1), ("_Single", 1), *(("_InParts", n) for n in possible - {1})}
    assert len({build.name for build in builds}) == len(builds) and "cascade" in builds[-1].name
