"""Targets: `ModelRunner.load_model`, `get_moe_cp_size`, `adjust_config_with_unaligned_cpu_tp`. Reason: with
sequence-parallel ranks every rank holds the whole model, while SGLang's layers would each take 1/R of it.

The layers read the tensor-parallel size only while they are built, so it is overridden just then.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches._patch import Patch


def _load_whole_model(original: Any, self: Any) -> Any:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    alone = {
        "tp_size": parallel.attn_tp_size,
        "tp_rank": parallel.attn_tp_rank,
        "tp_group": parallel.attn_tp_group,
        "attn_cp_size": 1,
        "attn_cp_rank": 0,
    }
    with parallel.override(**alone):
        return original(self)


def _keep_heads(original: Any, model_config: Any, load_config: Any, tp_size: int) -> Any:
    """On a CPU SGLang pads the heads to a multiple of the ranks; each of our ranks has them all."""
    return original(model_config, load_config, 1)


def _no_expert_ranks(original: Any) -> int:
    """Qwen3's layers, dense as they are, divide by it. SGLang reads it off a group that takes in our ranks."""
    return 1


PATCHES = (
    Patch("sglang.srt.layers.dp_attention.get_moe_cp_size", "around", (), _no_expert_ranks),
    Patch("sglang.srt.model_executor.model_runner.ModelRunner.load_model", "around", ("self",), _load_whole_model),
    Patch(
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "around",
        ("model_config", "load_config", "tp_size"),
        _keep_heads,
    ),
)
