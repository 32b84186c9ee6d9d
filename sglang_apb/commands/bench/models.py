"""A model by its numbers alone: a folder without weights, and what a prefill costs in floating-point operations."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError
from sglang_apb.layout import Layout, num_rows
from sglang_apb.options import MODEL_FAMILIES

# Servers of these run on dummy weights. The context is longer than the real model's, so that it is no limit.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 1048576,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 1048576,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@contextmanager
def shape_folder(name: str) -> Iterator[str]:
    """A temporary model folder that holds nothing but the config.json of SHAPES[name]."""
    with tempfile.TemporaryDirectory(prefix=f"sglang-apb-{name}-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
        yield folder


def read_config(model: str) -> dict[str, Any]:
    """The Hugging Face config of a model folder or hub name. Raises CommandError when there is none."""
    path = Path(model) / "config.json"
    try:
        if path.exists():
            return json.loads(path.read_text())
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise CommandError(f"{model} has no config.json that can be read: {error}") from error


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a dense decoder whose MLP has a gate: what its FLOPs follow from."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DecoderShape | None:
        """The sizes in a Hugging Face config; None for a family whose FLOPs are not counted here."""
        if (config.get("architectures") or [None])[0] not in MODEL_FAMILIES:
            return None
        num_heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            vocab=config["vocab_size"],
        )


def exact_flop(shape: DecoderShape, num_tokens: int) -> int:
    """Floating-point operations of a prompt's prefill with exact causal attention, up to its first token."""
    pairs = num_tokens * (num_tokens + 1) // 2
    return shape.num_layers * _layer_flop(shape, num_tokens, num_tokens, pairs) + _output_flop(shape)


def apb_flop(shape: DecoderShape, layout: Layout, *, one_pass: bool = True) -> int:
    """The same with APB, over all ranks: rows that several ranks compute (the question's) count for each.

    In one pass, the last layer has attention and what follows it for the question only (patches/last_layer.py).
    """
    rows = sum(num_rows(layout.rows_of(rank).tokens) for rank in range(layout.num_ranks))
    layer = _layer_flop(shape, rows, rows, layout.attention_pairs)
    last = layer
    if one_pass:
        question, context = len(layout.question), layout.context_end
        pairs = question * context + question * (question + 1) // 2
        last = _layer_flop(shape, rows, layout.num_ranks * question, pairs)
    return (shape.num_layers - 1) * layer + last + _output_flop(shape)


def _layer_flop(shape: DecoderShape, rows: int, attended_rows: int, pairs: int) -> int:
    """Q, K and V of `rows`, the other linear layers of `attended_rows`, QK and PV for `pairs` of a query and a key."""
    q_or_o = shape.hidden * shape.num_heads * shape.head_dim
    k_and_v = 2 * shape.hidden * shape.num_kv_heads * shape.head_dim
    mlp = 3 * shape.hidden * shape.intermediate
    linear = 2 * rows * (q_or_o + k_and_v) + 2 * attended_rows * (q_or_o + mlp)
    return linear + 4 * pairs * shape.num_heads * shape.head_dim


def _output_flop(shape: DecoderShape) -> int:
    """The output layer, for the last row."""
    return 2 * shape.hidden * shape.vocab
