"""How long a prompt may be: what fits in the KV slots of one rank."""

from __future__ import annotations

from sglang_apb.backends.base import PrefillBackend, Wish
from sglang_apb.layout import LayoutError


def fits(num_kept: int, num_slots: int, page_size: int) -> bool:
    """Whether a pool of `num_slots` slots, else empty, takes a prompt of which a rank keeps `num_kept` tokens.

    SGLang lets a prompt in when its slots, its first output token and a page to spare are fewer than the pool's.
    """
    return num_kept + 1 + page_size < num_slots


def largest_prompt(backend: PrefillBackend, num_slots: int, page_size: int) -> int:
    """Tokens of the longest prompt that a pool of `num_slots` slots a rank takes; 0 when none does.

    A few shorter ones may not fit all the same: what the largest rank owns grows by whole pages.
    """
    low, high = 0, num_slots
    while _prompt_fits(backend, high, num_slots, page_size):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _prompt_fits(backend, middle, num_slots, page_size) else (low, middle)
    return low


def _prompt_fits(backend: PrefillBackend, num_tokens: int, num_slots: int, page_size: int) -> bool:
    try:
        kept = backend.kept_tokens(backend.plan(num_tokens, Wish()))
    except LayoutError:
        return True  # too short to be laid out
    return kept is not None and fits(kept.num_slots, num_slots, page_size)
