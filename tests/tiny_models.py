"""Small models, with which real servers answer in a moment: random ones of each family, and one cut from SmolLM2."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def model_config(
    hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, feed_forward: int, dtype: torch.dtype, **more: Any
) -> Any:
    """What is read of SGLang's ModelConfig to count a prompt's memory, and `more` of it."""
    return SimpleNamespace(
        hidden_size=hidden,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        hf_text_config=SimpleNamespace(intermediate_size=feed_forward),
        **{"num_hidden_layers": 32} | more,
    )


def llama_8b(**more: Any) -> Any:
    """That of Llama-3.1-8B."""
    return model_config(4096, 32, 8, 128, 14336, torch.bfloat16, **more)


def make(family: str, tokenizer_dir: Path, output_dir: Path, **sizes: int) -> Path:
    """A model folder of `family` with the tokenizer of `tokenizer_dir`; weights are drawn with a fixed seed. `sizes`
    stand in place of the usual ones.
    """
    import transformers

    config_class = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    config = config_class(
        **_SIZES | sizes,
        vocab_size=49152,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if family == "MistralForCausalLM":
        config.sliding_window = None
    torch.manual_seed(0)
    model = getattr(transformers, family)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # wide enough that greedy tokens are not all the same
                parameter.normal_(std=0.08)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(output_dir)
    _copy_tokenizer(tokenizer_dir, output_dir)
    return output_dir


def cut(model_dir: Path, num_layers: int, output_dir: Path) -> Path:
    """The first `num_layers` layers of the Llama in `model_dir`: attention as sharp as a trained model's, for less."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
    model.save_pretrained(output_dir)
    _copy_tokenizer(model_dir, output_dir)
    return output_dir


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
