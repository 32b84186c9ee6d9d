"""A model's chat template."""

from __future__ import annotations

from typing import Any


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def num_template_tokens(model: str) -> int:
    """What a chat's template adds to the one message of it."""
    tokenizer = tokenizer_of(model)
    empty = [{"role": "user", "content": ""}]
    return len(tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False))
