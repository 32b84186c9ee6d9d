"""Points of answers, and how far a contestant's mean lies from exact attention's: paired, with a 95% interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Of one answer: 0 to 100."""

    contestant: str
    task: str
    length: int
    index: int
    points: float


@dataclass(frozen=True)
class Difference:
    """mean +- half_width of so many pairs; half_width is None where a task has only one."""

    mean: float
    half_width: float | None
    num_pairs: int

    def __str__(self) -> str:
        interval = "" if self.half_width is None else f" ± {self.half_width:.1f}"
        return f"{self.mean:+.1f}{interval}"


def mean_score(scores: Iterable[Score]) -> float | None:
    """Every (task, length) counts alike, however many samples it has; None without a score."""
    means = [statistics.fmean(points) for points in _groups(scores)]
    return statistics.fmean(means) if means else None


def difference(scores: Sequence[Score], others: Sequence[Score]) -> Difference | None:
    """`scores` minus `others` over the prompts that both have; None without one. Every (task, length) counts alike.

    The variance of a mean of T means of n_t pairs each is sum(s_t^2 / n_t) / T^2; its interval is Student's, with the
    degrees of freedom of Welch and Satterthwaite.
    """
    from scipy.stats import t as student

    points = {(score.task, score.length, score.index): score.points for score in others}
    pairs = [
        Score(score.contestant, score.task, score.length, score.index, score.points - points[key])
        for score in scores
        if (key := (score.task, score.length, score.index)) in points
    ]
    groups = _groups(pairs)
    if not groups:
        return None
    mean = statistics.fmean(statistics.fmean(group) for group in groups)
    if any(len(group) < 2 for group in groups):
        return Difference(mean, None, len(pairs))
    parts = [statistics.variance(group) / len(group) for group in groups]
    if sum(parts) == 0:
        return Difference(mean, 0.0, len(pairs))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half_width = float(student.ppf(0.975, freedom)) * math.sqrt(sum(parts)) / len(groups)
    return Difference(mean, half_width, len(pairs))


def _groups(scores: Iterable[Score]) -> list[list[float]]:
    groups: dict[tuple[str, int], list[float]] = {}
    for score in scores:
        groups.setdefault((score.task, score.length), []).append(score.points)
    return list(groups.values())
