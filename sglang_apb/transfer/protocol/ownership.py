"""Page ranges: which pages of a request a prefill rank holds. All ranges are half-open, [start, end)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

PageRange: TypeAlias = tuple[int, int]


def check_ranges(ranges: Sequence[PageRange], num_pages: int) -> tuple[PageRange, ...]:
    """The ranges in order, without empty ones.

    Raises ValueError when one overlaps another or leaves [0, num_pages).
    """
    ordered = tuple(sorted((int(start), int(end)) for start, end in ranges if end != start))
    last_end = 0
    for start, end in ordered:
        if not last_end <= start < end <= num_pages:
            raise ValueError(
                f"Page ranges {list(ranges)} must be disjoint, start <= end, inside [0, {num_pages}): "
                f"[{start}, {end}) is not."
            )
        last_end = end
    return ordered


def clip(ranges: Sequence[PageRange], window: PageRange) -> list[PageRange]:
    """The parts of `ranges` inside `window`."""
    low, high = window
    clipped = ((max(start, low), min(end, high)) for start, end in ranges)
    return [(start, end) for start, end in clipped if start < end]


def shift(ranges: Sequence[PageRange], offset: int) -> list[PageRange]:
    return [(start + offset, end + offset) for start, end in ranges]


def count(ranges: Sequence[PageRange]) -> int:
    return sum(end - start for start, end in ranges)


def share(ranges: Sequence[PageRange], index: int, num_shares: int) -> list[PageRange]:
    """Number `index` of `num_shares` about equal parts of the ranges' pages, in their order."""
    num_pages = count(ranges)
    low, high = (num_pages * number // num_shares for number in (index, index + 1))
    parts, before = [], 0
    for start, end in ranges:
        parts += clip([(start, end)], (start + low - before, start + high - before))
        before += end - start
    return parts


def find_partition_error(ranges_of_rank: Sequence[Sequence[PageRange]], num_pages: int) -> str | None:
    """None when the ranks' ranges cover every page of [0, num_pages) exactly once; else what is wrong."""
    owned = sorted((start, end, rank) for rank, ranges in enumerate(ranges_of_rank) for start, end in ranges)
    covered, last_rank = 0, 0
    for start, end, rank in owned:
        if start < covered:
            return f"prefill ranks {last_rank} and {rank} both hold pages [{start}, {min(covered, end)})"
        if start > covered:
            return f"no prefill rank holds pages [{covered}, {start}) of {num_pages}"
        covered, last_rank = end, rank
    if covered != num_pages:
        return f"no prefill rank holds pages [{covered}, {num_pages}) of {num_pages}"
    return None
