"""The picture of `bench ttft`: seconds over prompt length, a line a server."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.table import APB, Timing

_FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises CommandError when `write` could not draw into `path`: better than after an hour of measuring."""
    if path.suffix not in _FORMATS:
        raise CommandError(f"--plot {path} must end in one of {', '.join(_FORMATS)}")
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")


def write(path: Path, timings: Sequence[Timing], title: str) -> None:
    """Draws the medians, with bars from the fastest to the slowest time. Lengths without a figure are left out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for server in dict.fromkeys(timing.server for timing in timings):
        drawn = [timing for timing in timings if timing.server == server and timing.median is not None]
        medians = [timing.median or 0.0 for timing in drawn]
        spread = [
            [median - min(timing.seconds) for median, timing in zip(medians, drawn, strict=True)],
            [max(timing.seconds) - median for median, timing in zip(medians, drawn, strict=True)],
        ]
        width = 2.5 if server == APB else 1.5
        lengths = [timing.length for timing in drawn]
        axes.errorbar(lengths, medians, yerr=spread, label=server, marker="o", linewidth=width, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({timing.length for timing in timings})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to first token, s")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
