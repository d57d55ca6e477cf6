"""Table, record and plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import Results
from benchmarks.goals import Goal
from benchmarks.machine import describe_machine

RECORDS = Path(__file__).parent / "records"
COLUMNS = {"tokens_per_s": 1, "first_token_s": 1000, "token_s": 1000, "wait_p99_s": 1000}
"""Figures of a round, and what they are multiplied with to be shown."""


def print_table(results: Results) -> None:
    """In Markdown, as README.md has it."""
    print("\n| streams | arm | tokens/s | first token, ms | per token, ms | waited, p99, ms |")
    print("|---:|---|---:|---:|---:|---:|")
    for streams in results.plan.streams:
        for arm in results.arms:
            values = [f * results.median(arm, streams, name) for name, f in COLUMNS.items()]
            print(f"| {streams} | {arm} | {values[0]:.0f} | " + " | ".join(
                f"{value:.1f}" for value in values[1:]) + " |")  # fmt: skip


def print_goals(goals: Sequence[Goal]) -> None:
    print()
    for goal in goals:
        print(goal)


def write_record(
    name: str, model: str, results: Results, goals: Sequence[Goal], **more: Any
) -> None:
    """`benchmarks/records/<name>.json`, and its plot where matplotlib is installed."""
    more["goals"] = [goal.as_json() for goal in goals]
    write_figures(name, model=model, **more, **results.as_json())
    plot(results, RECORDS / f"{name}.png")


def write_figures(name: str, **figures: Any) -> None:
    """`benchmarks/records/<name>.json`: the figures, and the machine that they are of."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    record = {"machine": describe_machine(), **figures}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


def plot_lines(
    name: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[tuple[float, float]]],
    *, log: bool = True,
) -> None:  # fmt: skip
    """`benchmarks/records/<name>.png`, where matplotlib is installed.

    Args:
        lines: points (x, y) by the line's name.
        log: both axes are logarithmic.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    if log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    path = RECORDS / f"{name}.png"
    figure.savefig(path, dpi=110)
    print(path)


def plot_stacks(
    path: Path, x_label: str, y_label: str, bars: Mapping[str, Mapping[str, float]]
) -> None:
    """A stacked bar for each entry, where matplotlib is installed.

    Args:
        bars: parts by name, by the bar's name. All bars have the same parts.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    below = dict.fromkeys(bars, 0.0)
    for part in next(iter(bars.values())):
        heights = [own[part] for own in bars.values()]
        axis.bar(list(bars), heights, bottom=list(below.values()), label=part)
        below = {name: below[name] + own[part] for name, own in bars.items()}
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(path)


def plot(results: Results, path: Path) -> None:
    """Speed, first token and time per token over the numbers of streams."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = ("tokens per second", "first token, ms", "time per token, ms")
    for axis, (name, factor), title in zip(axes, list(COLUMNS.items())[:3], titles, strict=True):
        for arm in results.arms:
            values = [factor * results.median(arm, n, name) for n in results.plan.streams]
            axis.plot(results.plan.streams, values, marker="o", label=arm)
        axis.set_xscale("log", base=2)
        axis.set_xticks(results.plan.streams, [str(n) for n in results.plan.streams])
        axis.set_yscale("log")
        axis.set_xlabel("streams at a time")
        axis.set_title(title)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    print(path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
