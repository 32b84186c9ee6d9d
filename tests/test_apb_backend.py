"""The APB backend on a model runner that is not there: what it does without a model's layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import model_config

from sglang_apb.backends import apb
from sglang_apb.backends.base import Wish
from sglang_apb.config import ApbConfig
from sglang_apb.layout import LayoutError
from sglang_apb.rank_group import RankGroup


def backend(group: Any = None, replicate_kv: bool = False, **config: Any) -> apb.ApbBackend:
    runner = SimpleNamespace(
        model_config=model_config(64, 4, 2, 16, 128, torch.float32, context_len=8192),
        dtype=torch.float32,
        device="cpu",
        page_size=1,
    )
    return apb.ApbBackend(runner, ApbConfig(**config), RankGroup(group), replicate_kv=replicate_kv)


PAPER = {"order": "two_pass", "anchor_mode": "recomputed"}


@pytest.mark.parametrize(("config", "times"), [({}, 2), (PAPER, 1)], ids=["one pass", "two passes"])
def test_building_attends_once(config: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where a context can be found again once behind cached tokens."""
    monkeypatch.setattr(apb, "WARM_UP_TOKENS", 700)
    made = backend(**config)
    called = []
    engine = made._engine
    monkeypatch.setattr(engine, "plan", lambda calls: called.append(len(calls)) or type(engine).plan(engine, calls))
    build(made)
    assert len(called) == times


def test_the_layer_that_is_run_is_of_the_shortest_prompt_that_can_be_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, planned = backend(), []

    def plan(num_tokens: int, wish: Wish) -> Any:
        planned.append(num_tokens)
        if num_tokens < 2000:
            raise LayoutError("too short")
        return apb.layouts.plan(num_tokens, ApbConfig())

    monkeypatch.setattr(apb, "WARM_UP_TOKENS", 700)
    monkeypatch.setattr(made, "plan", plan)
    assert [build.name for build in made.builds()] == [
        "a layer of a prompt",
        "a layer of a prompt, of which rank 0 has a part of a block",
        "a layer of a round",
        "a layer of a later round",
    ]
    assert planned == [700, 1400, 2800]
    monkeypatch.setattr(apb, "WARM_UP_TOKENS", 1500)
    made._runner.model_config.context_len = 1999
    assert made.builds() == []


def build(made: apb.ApbBackend) -> None:
    for each in made.builds():
        each.run()


def _build(group: Any) -> None:
    apb.WARM_UP_TOKENS = 700
    build(backend(group, block=175, anchor=100))


def test_ranks_build_together() -> None:
    run_ranks(2, _build, timeout_s=300)  # each imports SGLang, which takes its time on a busy machine


def test_activations_are_those_of_the_rank_with_most_rows() -> None:
    made = backend(block=188)
    plan = made.plan(1000, Wish())
    row = 1.15 * 4 * (2 * 64 + 64 + 64 + 64 + 64)  # residual, input, Q, K and V, attention, output; float32
    question_row = 1.15 * 4 * 2 * (64 + 4 * 4)  # its attention over the context and over itself, in float32
    of_question = len(plan.question) * int(question_row)
    assert made.activation_bytes(plan) == 1000 * int(row) + of_question
    recomputed = backend(block=188, anchor=100, anchor_mode="recomputed")
    copied = 100 + len(recomputed.plan(1000, Wish()).question)
    assert recomputed.activation_bytes(recomputed.plan(1000, Wish())) == (1000 + copied) * int(row) + of_question


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_keys_stand_before_the_rows_whatever_the_pools_type(dtype: torch.dtype) -> None:
    """`--kv-cache-dtype` may be another one than the model's."""
    pool = torch.arange(20 * 2 * 4, dtype=torch.float32).view(20, 2, 4)
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(
            get_key_buffer=lambda layer: pool.to(dtype), get_value_buffer=lambda layer: -pool.to(dtype)
        ),
        req_to_token_pool=None,
    )
    layout = apb.layouts.plan(12, ApbConfig(block=4, question_tokens=2), num_cached=6)
    slots = torch.arange(19, 7, -1)
    cache = apb.KvCache(runner, slots, layout, RankGroup(), False, True, lambda layer: None)
    rows = apb.LayerRows.random(6, 4, 2, 4, "cpu", torch.float32)
    found = cache.with_cached(0, rows)
    assert found.q is rows.q
    for both, cached, new in ((found.k, pool, rows.k), (found.v, -pool, rows.v)):
        assert torch.equal(both, torch.cat((cached[slots[:6]].to(dtype).float(), new)))
