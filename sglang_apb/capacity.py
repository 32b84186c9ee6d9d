"""How long a prompt may be: what fits in one rank's KV slots, and in what is left of its GPU for activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_apb.backends.base import PrefillBackend, Wish
from sglang_apb.layout import LayoutError

# Kept free while a prompt runs, whatever it and the model are: NCCL's, and what the allocator cannot use.
FIXED_BYTES = 2 << 30
# What a server takes between its pool and its first prompt: CUDA graphs, kernels, FlashInfer's workspaces. 1.6 to 2.1
# GiB were seen (Llama-3.1-8B's shape, H200).
STARTING_BYTES = 9 << 28


@dataclass(frozen=True)
class Space:
    """What one rank has for a prompt. `activation_bytes` None: nothing is known, and nothing checked."""

    num_slots: int
    page_size: int
    activation_bytes: int | None = None

    def fits(self, num_kept: int) -> bool:
        """Whether the pool, else empty, takes a prompt of which a rank keeps `num_kept` tokens.

        SGLang lets a prompt in when its slots, its first output token and a page to spare are fewer than the pool's.
        """
        return num_kept + 1 + self.page_size < self.num_slots


def largest_prompt(backend: PrefillBackend, space: Space) -> int:
    """Tokens of the longest prompt that ranks with `space` each take; 0 when none does.

    A few shorter ones may not fit all the same: what the largest rank owns grows by whole pages.
    """
    low, high = 0, max(space.num_slots, 1)
    while _prompt_fits(backend, high, space):
        low, high = high, 2 * high
    return _largest(lambda num_tokens: _prompt_fits(backend, num_tokens, space), low, high)


def _prompt_fits(backend: PrefillBackend, num_tokens: int, space: Space) -> bool:
    try:
        plan = backend.plan(num_tokens, Wish())
    except LayoutError:
        return True  # too short to be laid out
    own = backend.own_slots(plan)
    if not space.fits(num_tokens if own is None else own.num_slots):
        return False
    return space.activation_bytes is None or backend.activation_bytes(plan) <= space.activation_bytes


def pool_bytes(free_bytes: int, kv_bytes: int, activation_bytes: Callable[[int], int]) -> int:
    """How much of `free_bytes` to give to a KV pool, so that the longest prompt in it can be computed in the rest.

    kv_bytes: of one token. activation_bytes: of the longest prompt that a pool of so many tokens takes.
    """

    def fits(num_tokens: int) -> bool:
        return num_tokens * kv_bytes + activation_bytes(num_tokens) <= free_bytes

    return _largest(fits, 0, max(free_bytes, 0) // kv_bytes + 1) * kv_bytes


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` on that fits; `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
