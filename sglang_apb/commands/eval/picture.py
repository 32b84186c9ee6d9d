"""The picture of an evaluation: scores against length, against attention's share, and against time."""

from __future__ import annotations

from pathlib import Path

from sglang_apb.commands.eval.scores import mean_score
from sglang_apb.commands.eval.summary import Summary


def write(path: Path, summary: Summary, title: str) -> None:
    """Needs matplotlib. A line a contestant over the lengths, and a point for each length beside it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_length, by_share, by_time = figure.subplots(1, 3, sharey=True)
    for name in summary.contestants:
        costs = [row for row in summary.costs() if row["contestant"] == name]
        means = [mean_score(summary.scores(name, row["length"])) for row in costs]
        by_length.plot([row["length"] for row in costs], means, marker="o", label=name)
        by_share.plot([row["attention_share"] for row in costs], means, marker="o", linestyle=":", label=name)
        by_time.plot([row["first_token_s"] for row in costs], means, marker="o", linestyle=":", label=name)
    by_length.set_xscale("log", base=2)
    by_length.xaxis.set_major_locator(FixedLocator(summary.lengths))
    by_length.xaxis.set_minor_locator(NullLocator())
    by_length.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    by_time.set_xscale("log")
    labels = ("prompt tokens", "share of exact attention's work", "time to first token, s, median")
    for axes, label in zip((by_length, by_share, by_time), labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_length.set_ylabel("score, mean of tasks")
    by_length.legend()
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
