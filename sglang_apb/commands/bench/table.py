"""Timings of servers, and what is said of them: medians, ratios, rates, Markdown tables. Arithmetic and text only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The server that the others are compared with; every other one is plain SGLang.
APB = "apb"
NO_FIGURE = "-"


@dataclass
class Timing:
    """One server's times for prompts of one length, in seconds from request to answer.

    `reason` says why there is no figure; times taken before that stay. `prefill` as `prefill_report` gives it.
    """

    server: str
    length: int
    seconds: list[float] = field(default_factory=list)
    warm_up_seconds: list[float] = field(default_factory=list)
    prefill: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds; None without a figure."""
        return statistics.median(self.seconds) if self.seconds and self.reason is None else None


@dataclass(frozen=True)
class Rate:
    """What a median amounts to: `flop` are a prompt's operations, None where they cannot be counted."""

    tokens_per_s: float
    flop: int | None
    tflop_per_s_per_gpu: float | None


Flop = Callable[[Timing], int | None]


def rate_of(timing: Timing, flop: int | None, num_gpus: int) -> Rate | None:
    """None for a timing without a figure."""
    if timing.median is None:
        return None
    per_gpu = None if flop is None else flop / timing.median / num_gpus / 1e12
    return Rate(timing.length / timing.median, flop, per_gpu)


def ratio(timings: Sequence[Timing], length: int) -> float | None:
    """The best plain SGLang's median over APB's: above 1, APB is faster. None when one of them is missing."""
    return best_over_apb({timing.server: timing.median for timing in timings if timing.length == length})


def best_over_apb(seconds: Mapping[str, float | None]) -> float | None:
    """The same of each server's time, None where it has none."""
    apb = seconds.get(APB)
    plain = [time for server, time in seconds.items() if server != APB and time is not None]
    return min(plain) / apb if plain and apb else None


def ttft_table(timings: Sequence[Timing]) -> str:
    """A row a length, a column a server with its median, and the ratio."""
    servers = list(dict.fromkeys(timing.server for timing in timings))
    medians = {(timing.server, timing.length): timing.median for timing in timings}
    rows = [
        [
            f"{length:,}",
            *(shown_seconds(medians.get((server, length))) for server in servers),
            shown_ratio(ratio(timings, length)),
        ]
        for length in dict.fromkeys(timing.length for timing in timings)
    ]
    return markdown(["tokens", *servers, "best plain / apb"], rows)


def rate_table(timings: Sequence[Timing], flop: Flop, num_gpus: int, unit: str) -> str:
    """A row for each figure, by length: tokens/s, operations, and operations a second of one `unit` (GPU, rank)."""
    rows = []
    for timing in sorted(timings, key=lambda timing: timing.length):
        rate = rate_of(timing, flop(timing), num_gpus)
        if rate is not None:
            rows.append([f"{timing.length:,}", timing.server, *_rate_cells(rate)])
    return markdown(["tokens", "server", "tokens/s", "TFLOP", f"TFLOP/s per {unit}"], rows)


def notes(timings: Sequence[Timing]) -> list[str]:
    """A line for what the table cannot show: why there is no figure, and how APB's server prefilled."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for timing in timings:
        if timing.reason is not None:
            reasons.setdefault((timing.server, timing.reason), []).append(timing.length)
    lines = [f"{server}, {_listed(lengths)} tokens: {reason}" for (server, reason), lengths in reasons.items()]
    return lines + [_prefill_note(t) for t in timings if t.server == APB and t.median is not None]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its cells padded so that it is one on a screen, too; numbers stand to the right."""
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]
    numeric = [
        all(row[column].lstrip("-")[:1].isdigit() or row[column] == NO_FIGURE for row in rows)
        for column in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _rate_cells(rate: Rate) -> list[str]:
    flop = NO_FIGURE if rate.flop is None else _short(rate.flop / 1e12)
    per_gpu = NO_FIGURE if rate.tflop_per_s_per_gpu is None else _short(rate.tflop_per_s_per_gpu)
    return [f"{rate.tokens_per_s:,.0f}", flop, per_gpu]


def _prefill_note(timing: Timing) -> str:
    report = timing.prefill
    if report.get("method") != APB:
        return f"{APB}, {timing.length:,} tokens: prefilled with exact attention, the prompt is below min_tokens"
    share = report["attention_share"]
    blocks = "1 block" if report["num_blocks"] == 1 else f"{report['num_blocks']} blocks"
    return f"{APB}, {timing.length:,} tokens: {blocks}, {share:.0%} of exact attention's query-key pairs"


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(f"{length:,}" for length in lengths)


def shown_seconds(seconds: float | None) -> str:
    return NO_FIGURE if seconds is None else f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.2f} s"


def shown_ratio(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.2f}x"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
