"""A model's tokenizer and its chat template."""

from __future__ import annotations

from typing import Any

from sglang_apb.commands import CommandError


def config_of(model: str) -> Any:
    """Raises CommandError."""
    from transformers import AutoConfig

    return _loaded(AutoConfig, model)


def tokenizer_of(model: str) -> Any:
    """Raises CommandError."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, model)


def num_template_tokens(model: str) -> int:
    """What a chat's template adds to the one message of it. Raises CommandError."""
    return len(chat_ids(tokenizer_of(model), [{"role": "user", "content": ""}]))


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat that asks for an answer. Raises CommandError when the model has no template that takes it."""
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program of the model's author
        raise CommandError(f"the model's chat template does not take these messages: {error}") from error


def _loaded(kind: Any, model: str) -> Any:
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CommandError(f"--model {model} is no model folder or name that can be read: {first}") from error
