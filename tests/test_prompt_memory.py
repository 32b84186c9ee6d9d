"""The KV pool leaves a GPU's memory for the activations of a prompt that fills it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.distributed.parallel_state
import sglang.srt.utils
from sglang_apb.patches import prompt_memory
from tiny_models import llama_8b

from sglang_apb import capacity
from sglang_apb.backends.apb import ApbBackend
from sglang_apb.config import ApbConfig
from sglang_apb.options import PluginOptions

GIB = 1 << 30
# Llama-3.1-8B: 8 KV heads of 128 in 32 layers are 131,072 bytes of KV a token.
KV_BYTES = 131072
FEED_FORWARD_BYTES = 24576 * (3 * 14336 + 4096) * 2
KEPT_FREE = capacity.FIXED_BYTES + capacity.STARTING_BYTES
FREE_GIB, CONTEXT = 60, 131072


def configurator(device: str = "cuda", is_given: bool = False, sp_size: int = 1) -> Any:
    server_args = SimpleNamespace(
        mem_fraction_static=0.8 if is_given else None,
        plugin_options=PluginOptions("apb", sp_size),
        disaggregation_mode="prefill",
        disaggregation_transfer_backend="zmq",
    )
    return SimpleNamespace(
        device=device,
        gpu_id=0,
        server_args=server_args,
        model_config=llama_8b(num_hidden_layers=32, context_len=CONTEXT),
        page_size=1,
        resolve_max_num_reqs=lambda num_tokens: 16,
    )


def of_prompt(num_tokens: int) -> int:
    return ApbBackend.activations(llama_8b(), ApbConfig(), 1, 1, False)(num_tokens)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(world_size=1, cpu_group=None)
    monkeypatch.setattr(sglang.srt.distributed.parallel_state, "get_world_group", lambda: world)
    monkeypatch.setattr(sglang.srt.utils, "get_available_gpu_memory", lambda *args, **more: FREE_GIB)


def test_a_full_pool_leaves_what_its_rows_take() -> None:
    pool = prompt_memory._leave_space(60 * GIB, configurator(), 0.0)
    table = 16 * CONTEXT * 4
    free = FREE_GIB * GIB - KEPT_FREE - FEED_FORWARD_BYTES - table
    assert free // KV_BYTES > CONTEXT
    assert 0 <= free - of_prompt(CONTEXT) - pool < KV_BYTES  # no prompt is longer


def test_a_small_pool_leaves_what_its_rows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang.srt.utils, "get_available_gpu_memory", lambda *args, **more: 20)
    pool = prompt_memory._leave_space(50 * GIB, configurator(), 0.0)
    num_tokens = pool // KV_BYTES
    free = 20 * GIB - KEPT_FREE - FEED_FORWARD_BYTES - 16 * CONTEXT * 4
    assert pool + of_prompt(num_tokens) <= free < pool + KV_BYTES + of_prompt(num_tokens + 1)


def test_a_smaller_pool_stays_as_it_is() -> None:
    assert prompt_memory._leave_space(GIB, configurator(), 0.0) == GIB


@pytest.mark.parametrize("given", [{"is_given": True}, {"device": "cpu"}], ids=str)
def test_sglangs_own_choice_stands(given: dict[str, Any]) -> None:
    """With --mem-fraction-static, and where nothing is known of the memory."""
    assert prompt_memory._leave_space(50 * GIB, configurator(**given), 0.0) == 50 * GIB
