"""Whose KV `bench transfer` moves, and how long it took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

RAW = "raw TCP socket"
PLAIN_NCCL = "NCCL send and receive"


@dataclass(frozen=True)
class Prompt:
    """KV of `num_tokens` tokens: `num_buffers` buffers (K and V of each layer), `item_len` bytes a token in each."""

    name: str
    num_buffers: int
    item_len: int
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        return self.num_buffers * self.item_len * self.num_tokens


# bfloat16: KV heads x head size x 2 bytes.
PROMPTS = {
    "smollm2": Prompt("SmolLM2, 6,000 tokens", num_buffers=2 * 30, item_len=3 * 64 * 2, num_tokens=6000),
    "1gb": Prompt("Llama-3.1-8B, 8,192 tokens", num_buffers=2 * 32, item_len=8 * 128 * 2, num_tokens=8192),
    "17gb": Prompt("Llama-3.1-8B, 131,072 tokens", num_buffers=2 * 32, item_len=8 * 128 * 2, num_tokens=131072),
}


@dataclass(frozen=True)
class Time:
    prompt: str
    way: str
    num_bytes: int
    seconds: list[float]

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / statistics.median(self.seconds) / 1e9
