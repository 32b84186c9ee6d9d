"""What a prefill and a decode server must agree on before one byte of KV moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

# Of one model's configuration, what two servers that run it may well have different.
_NOT_THE_MODEL = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config"),
        *("original_num_attention_heads", "original_total_num_kv_heads"),  # SGLang's own notes, on CPUs
        "context_len",  # SGLang's note of --context-length, by which each server refuses prompts at its own door
    }
)

_ItemLens = Annotated[list[Annotated[int, Meta(ge=1, le=1 << 31)]], Meta(max_length=8192)]
_Text = Annotated[str, Meta(max_length=256)]
_Size = Annotated[int, Meta(ge=0, le=1 << 31)]


class Compat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One server's side. `kv_head_lens`: bytes of one page and head in each buffer; `aux_item_lens`: of one row.
    `prefill_backend`: ours, of the prefill server; `reuses_kv`: whether the decode server finds the KV of earlier
    prompts in its prefix cache.
    """

    model: _Text
    model_hash: _Text
    kv_dtype: _Text
    page_size: _Size
    num_kv_heads: _Size
    kv_head_lens: _ItemLens
    aux_item_lens: _ItemLens
    prefill_backend: _Text = ""
    reuses_kv: bool = False


def describe_model(architecture: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """A readable line and a hash of `config` (a Hugging Face text configuration as a dict)."""
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
    line = (
        f"{architecture} with {config.get('num_hidden_layers')} layers, hidden size "
        f"{config.get('hidden_size')}, {config.get('num_key_value_heads')} KV heads, vocabulary "
        f"{config.get('vocab_size')}, configuration {digest}"
    )
    return line[:256], digest


def find_difference(prefill: Compat, decode: Compat) -> str | None:
    """One sentence with both values and the remedy, or None when the two servers fit."""
    if prefill.model_hash != decode.model_hash:
        return (
            f"The prefill server runs {prefill.model}, and the decode server runs {decode.model}: "
            f"start both with the same --model-path and model options."
        )
    options = (
        ("KV cache dtype", prefill.kv_dtype, decode.kv_dtype, "--kv-cache-dtype (and --dtype)"),
        ("page size", prefill.page_size, decode.page_size, "--page-size"),
        ("KV heads", prefill.num_kv_heads, decode.num_kv_heads, "--model-path"),
    )
    for name, ours, theirs, option in options:
        if ours != theirs:
            return f"The prefill server has {name} {ours}, the decode server {theirs}: give both the same {option}."
    if prefill.prefill_backend and decode.reuses_kv:
        return (
            f"The prefill server runs --prefill-backend {prefill.prefill_backend}, and the KV of its prompts depends "
            "on their questions; the decode server would answer others over it: start it without "
            "--disaggregation-decode-enable-radix-cache."
        )
    if prefill.kv_head_lens != decode.kv_head_lens:
        return (
            f"A head's page has {sum(prefill.kv_head_lens)} bytes in {len(prefill.kv_head_lens)} buffers on the "
            f"prefill server and {sum(decode.kv_head_lens)} bytes in {len(decode.kv_head_lens)} buffers on "
            f"the decode server: start both with the same model, dtype and speculative decoding options."
        )
    if prefill.aux_item_lens != decode.aux_item_lens:
        return (
            f"A request's first-token record has {sum(prefill.aux_item_lens)} bytes on the prefill server "
            f"and {sum(decode.aux_item_lens)} on the decode server: start both with the same SGLang version "
            f"and speculative decoding options."
        )
    return None
