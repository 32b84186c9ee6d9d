"""Prompts and requests of the server tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

_WORDS = (
    *("time", "people", "way", "water", "day", "part", "place", "work", "week", "case", "point", "government"),
    *("company", "number", "group", "problem", "fact", "hand", "eye", "life", "world", "school", "state"),
    *("family", "student", "night", "house", "street", "river", "garden"),
)
GREEDY = {"max_new_tokens": 32, "temperature": 0, "ignore_eos": True}
# Exact attention written by blocks, in rounds of two a rank: every token is passed on.
ALL_PASSED = '{"passing": "all", "block": 128, "anchor": 128, "round_tokens": 256, "min_tokens": 512}'


@dataclass(frozen=True)
class Answer:
    """What a server said to one prompt, token by token."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prefill: dict[str, Any] | None
    cached_tokens: int


def prompts(model: Path, lengths: tuple[int, ...]) -> list[list[int]]:
    """Token ids of sentences with one number to remember, each about as long as asked; the same at every call."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [_prompt(tokenizer, length) for length in lengths]


def _prompt(tokenizer: Any, length: int) -> list[int]:
    draw = random.Random(length)
    question = "\nQuestion: What is the special magic number for Paris?\nAnswer: The special magic number for Paris is"
    tail = tokenizer(question)["input_ids"]
    sentences = (" ".join(draw.choice(_WORDS) for _ in range(12)).capitalize() + ". " for _ in range(length))
    filler = tokenizer("".join(sentences))["input_ids"]
    needle = tokenizer(f" The special magic number for Paris is {draw.randrange(10**6, 10**7)}. ")["input_ids"]
    num_filler = length - len(tail) - len(needle)
    depth = draw.randrange(num_filler // 10, num_filler * 9 // 10)
    return filler[:depth] + needle + filler[depth:num_filler] + tail


def generate(url: str, token_ids: list[int], *, timeout: float = 300, **fields: Any) -> Answer:
    """Greedy tokens and their logprobs from /generate; `fields` override the request's. Raises requests.Timeout."""
    body: dict[str, Any] = {"input_ids": token_ids, "return_logprob": True, "sampling_params": GREEDY}
    response = requests.post(f"{url}/generate", json=body | fields, timeout=timeout)
    assert response.ok, response.text[:1000]
    answer = response.json()
    meta = answer["meta_info"]
    return Answer(
        text=answer["text"],
        token_ids=tuple(answer["output_ids"]),
        logprobs=tuple(entry[0] for entry in meta["output_token_logprobs"]),
        prefill=meta.get("prefill"),
        cached_tokens=meta["cached_tokens"],
    )


def assert_same_tokens(found: Answer, wanted: Answer, tolerance: float = 1e-3) -> None:
    assert found.token_ids == wanted.token_ids
    worst = max(abs(a - b) for a, b in zip(found.logprobs, wanted.logprobs, strict=True))
    assert worst < tolerance, f"logprobs differ by {worst}"


def assert_ran_sparse(answer: Answer, num_ranks: int) -> None:
    """A long prompt that fell back to the exact path would give the right tokens, too."""
    assert answer.prefill is not None, "the answer does not say how it was prefilled"
    assert (answer.prefill["method"], answer.prefill["num_ranks"]) == ("apb", num_ranks)
