"""Pictures of where time goes: a bar a call, or a bar a method with its parts on top of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BAR_HEIGHT = 0.32  # inches


def write_bars(path: Path, groups: Mapping[str, Sequence[tuple[str, float]]], unit: str, title: str) -> None:
    """Draws horizontal bars, (label, value) each, in a panel of its own for each group."""
    num_bars = [len(bars) for bars in groups.values()]
    figure = _figure(9, sum(num_bars) * _BAR_HEIGHT + len(groups) * 0.8 + 0.6)
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=num_bars)[:, 0]
    for axes, (name, bars) in zip(panels, groups.items(), strict=True):
        drawn = axes.barh([label for label, _ in bars], [value for _, value in bars])
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize="small")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel(unit)
    _save(figure, path, title)


def write_stacks(
    path: Path,
    groups: Mapping[str, Mapping[str, Mapping[str, float]]],
    parts: Sequence[str],
    hatched: str,
    unit: str,
    title: str,
) -> None:
    """Draws a bar for each of a group's entries, its `parts` in this order from below, the part `hatched` hatched.

    A part below zero (the rest of a noisy measurement) is left out of its bar; the number on top has it in it.
    Groups have panels of their own.
    """
    colors = _colors(parts)
    num_bars = [len(bars) for bars in groups.values()]
    figure = _figure(max(5.0, 1.1 * sum(num_bars) + 3.5), 6)
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=num_bars)[0]
    for axes, (name, bars) in zip(panels, groups.items(), strict=True):
        for label, bar in bars.items():
            _stack(axes, label, bar, colors, hatched)
        axes.set_title(name, fontsize="small")
        axes.set_ylabel(unit)
        axes.margins(y=0.08)
        axes.tick_params(axis="x", labelsize="small")
    handles = [_patch(part, colors, hatched) for part in reversed(parts)]
    figure.legend(handles=handles, loc="outside right center", fontsize="small")
    _save(figure, path, title)


def _stack(axes: Any, label: str, parts: Mapping[str, float], colors: Mapping[str, Any], hatched: str) -> None:
    bottom = 0.0
    for part in colors:
        value = parts.get(part, 0.0)
        if value > 0:
            axes.bar([label], [value], bottom=bottom, width=0.7, **_look(part, colors, hatched))
            bottom += value
    axes.text(label, bottom, f"{sum(parts.values()):.3g}", ha="center", va="bottom", fontsize="small")


def _patch(part: str, colors: Mapping[str, Any], hatched: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(label=part, **_look(part, colors, hatched))


def _look(part: str, colors: Mapping[str, Any], hatched: str) -> dict[str, Any]:
    return {"facecolor": colors[part], "edgecolor": "white", "hatch": "///" if part == hatched else None}


def _colors(parts: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    return {part: colormaps["tab20"](index) for index, part in enumerate(parts)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
