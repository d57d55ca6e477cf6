"""Draw the Grafana dashboard's panels without Grafana, from what Prometheus has.

    python -m monitoring.plot --minutes 10 dashboard.png

Each panel's own queries are sent, with every variable set to "all".
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import requests
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.ticker import FuncFormatter

DASHBOARD = Path(__file__).with_name("grafana-dashboard.json")
VARIABLES = ("model", "application", "replica")
COLUMNS = 24
INCHES_PER_ROW = 0.34
MAX_LEGEND = 8


def seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


FORMATS = {
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "s": seconds,
    "bytes": lambda value: f"{value / 1e6:.3g} MB",
    "reqps": lambda value: f"{value:.3g}/s",
}


def shown(value: float, unit: str) -> str:
    return FORMATS.get(unit, lambda v: f"{v:.5g}")(value)


def substitute(expression: str, rate_interval: str) -> str:
    """A panel's query with its variables filled in: all models, all replicas."""
    for name in VARIABLES:
        expression = expression.replace(f"${name}", ".*")
    return expression.replace("$__rate_interval", rate_interval)


def query(url: str, expression: str, start: float, end: float, step_s: int) -> list[dict[str, Any]]:
    """
    Raises:
        RuntimeError: Prometheus takes the query for wrong, or cannot answer it.
    """
    response = requests.get(
        f"{url}/api/v1/query_range",
        params={"query": expression, "start": start, "end": end, "step": step_s},
        timeout=30,
    )
    answer = response.json()
    if answer["status"] != "success":
        raise RuntimeError(f"{expression}: {answer['error']}")
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, timezone.utc)


def legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


def draw(
    axes: Axes,
    panel: dict[str, Any],
    series: dict[str, list[tuple[float, float]]],
    start: float,
    end: float,
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], fontsize=9, loc="left")
    if panel["type"] == "stat":
        last = [points[-1][1] for points in series.values() if points]
        value = last[0] if last and not math.isnan(last[0]) else 0.0
        axes.text(0.5, 0.4, shown(value, defaults["unit"]), ha="center", va="center", fontsize=18)
        axes.set_axis_off()
        return
    dashed = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    for name, points in sorted(series.items()):
        moments = [moment(at) for at, _ in points]
        style = {"color": "gray", "linestyle": "--"} if name in dashed else {}
        axes.plot(moments, [value for _, value in points], linewidth=1.2, label=name, **style)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if series:
        axes.set_xlim(moment(start), moment(end))  # type: ignore[arg-type]
        axes.xaxis.set_major_locator(AutoDateLocator(maxticks=6))
        axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
        if len(series) <= MAX_LEGEND:
            axes.legend(fontsize=7, loc="best", framealpha=0.6)
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m monitoring.plot", description=__doc__)
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--prometheus", default="http://localhost:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=30.0, help="how many to show")
    parser.add_argument("--ago", type=float, default=0.0, help="minutes since their end")
    parser.add_argument("--step", type=int, default=5, help="seconds between two points")
    parser.add_argument("--rate-interval", default="40s", help="four times the scrape interval")
    options = parser.parse_args(arguments)
    end = time.time() - 60 * options.ago
    start = end - 60 * options.minutes

    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(17, INCHES_PER_ROW * rows), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    for panel in panels:
        series = {
            legend(target["legendFormat"], result["metric"]): [
                (float(at), float(value)) for at, value in result["values"]
            ]
            for target in panel["targets"]
            for result in query(
                options.prometheus, substitute(target["expr"], options.rate_interval),
                start, end, options.step,
            )
        }  # fmt: skip
        at = panel["gridPos"]
        place = grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]]
        draw(figure.add_subplot(place), panel, series, start, end)
    figure.savefig(options.picture, dpi=80)


if __name__ == "__main__":
    main()
