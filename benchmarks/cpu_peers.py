"""A Llama-7B layer's linears on a CPU: our backends, torch, ggml and onnxruntime, side by side.

    python -m benchmarks.cpu_peers [--ggml FOLDER] [--threads N] [--record NAME]

FOLDER holds ggml's shared libraries, e.g. `llama_cpp/lib` of llama-cpp-python, built for this
machine. onnxruntime (with onnx) is an arm where it is installed. A pass is one layer, all four
linears one after the other, whose weights are more than a cache holds, as in decoding. The arms
take turns, and so does reading memory, by which one row is judged; where passes are short, an
unmeasured one comes first. A layer's time is the sum of its linears' least of all passes. With one
thread the clock is that thread's own, so that other processes' turns on its core do not count.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cpu_products import Product, arms
from benchmarks.goals import Goal
from benchmarks.machine import busy_cpus
from benchmarks.report import print_goals, write_figures
from models.awq import quantize_rtn
from models.command_line import HelpFormatter

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate-up": (22016, 4096), "down": (4096, 11008)}
"""(N, K)."""
LAYERS = 32
ROWS = (1, 4, 16, 640)
GROUP = 128
SECONDS = 0.15
"""Of one turn of one arm, at least one pass."""
TURNS = 8
FEWEST_TURNS = 2
"""Where passes take longer than SECONDS."""
LONG_ROWS = 64
"""Passes of more take longer than SECONDS anyhow."""
BUFFER_BYTES = 1 << 30
PART_BYTES = 45 << 20
"""As much as the largest linear has, for other processes to leave it alone as often."""
PLOTS = Path(__file__).parent.parent / "docs"


class Reader:
    """Reads memory in order, in huge pages, with all threads and with one."""

    def __init__(self, threads: int) -> None:
        # Shared memory, the default, gets no huge pages.
        self._memory = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._data = torch.frombuffer(self._memory, dtype=torch.int64)
        self._data.fill_(1)
        self._threads = threads
        self.best_gb_per_s = 0.0

    def turn(self) -> None:
        for threads in {1, self._threads}:
            torch.set_num_threads(threads)
            for part in self._data.split(PART_BYTES // 8):
                seconds = _seconds(part.sum)
                self.best_gb_per_s = max(self.best_gb_per_s, part.nbytes / seconds / 1e9)
        torch.set_num_threads(self._threads)


def _seconds(call: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    call()
    return clock() - before


def build_layer(ggml: Path | None, threads: int) -> tuple[dict[str, list[Product]], dict[str, Any]]:
    """Each arm's four products; and the relative errors of those with the same 4-bit weights."""
    makers = arms(ggml, threads, GROUP)
    layer: dict[str, list[Product]] = {name: [] for name in makers}
    errors: dict[str, list[float]] = {}
    for n, k in tqdm(SHAPES.values(), "packing"):
        weight = torch.randn(n, k) / k**0.5
        quantized = quantize_rtn(weight.half(), GROUP)
        x = torch.randn(4, k).bfloat16()
        exact = x.double() @ quantized.dequantize(torch.float64).T
        for name, make in makers.items():
            product = make(weight, quantized)
            layer[name].append(product)
            if product.same_weights:
                error = (product.bind(x)().double() - exact).square().mean().sqrt()
                errors.setdefault(name, []).append(float(error / exact.square().mean().sqrt()))
    return layer, {name: max(values) for name, values in errors.items()}


def measure(
    layer: dict[str, list[Product]], rows: int, reader: Reader, turns: int
) -> dict[str, list[list[float]]]:
    """By arm, seconds of the four products in each pass."""
    inputs = [torch.randn(rows, k).bfloat16() for _, k in SHAPES.values()]
    calls = {
        name: [product.bind(x) for product, x in zip(products, inputs, strict=True)]
        for name, products in layer.items()
    }
    passes: dict[str, list[list[float]]] = {name: [] for name in layer}
    names = list(layer)
    slow = rows > LONG_ROWS
    for turn in tqdm(range(turns), f"{rows} rows"):
        if slow and turn >= FEWEST_TURNS:
            break
        reader.turn()
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if not slow:
                _pass(calls[name])
            started = time.perf_counter()
            passes[name].append(_pass(calls[name]))
            slow |= time.perf_counter() - started > SECONDS
            while time.perf_counter() - started < SECONDS:
                passes[name].append(_pass(calls[name]))
    return passes


def _pass(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    return [_seconds(call) for call in calls]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_peers", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--ggml", type=Path, help="the folder of libggml-base.so and others")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each arm"
    )
    parser.add_argument(
        "--record", metavar="NAME", help="write benchmarks/records/NAME.json and docs/NAME.png"
    )
    parser.add_argument(
        "--turns", type=int, default=TURNS, help="of every arm; figures are medians over them"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=ROWS, help="of a product; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    busy = busy_cpus()
    reader = Reader(options.threads)
    layer, errors = build_layer(options.ggml, options.threads)
    with torch.inference_mode():
        passes = {rows: measure(layer, rows, reader, options.turns) for rows in options.rows}
    limit = reader.best_gb_per_s
    figures: dict[str, Any] = {}
    for name, products in layer.items():
        products_ms = {
            str(rows): {
                layer_name: 1e3 * min(column)
                for layer_name, column in zip(SHAPES, zip(*own[name], strict=True), strict=True)
            }
            for rows, own in passes.items()
        }
        least = {rows: sum(times.values()) for rows, times in products_ms.items()}
        num_bytes = sum(product.num_bytes for product in products)
        figures[name] = {
            "layer_ms": least,
            "layer_median_ms": {
                str(rows): 1e3 * statistics.median(map(sum, own[name]))
                for rows, own in passes.items()
            },
            "product_ms": products_ms,
            "weights_mb": num_bytes / 1e6,
            "share_of_read_limit": num_bytes / least["1"] / 1e6 / limit if "1" in least else None,
            "relative_error": errors.get(name),
        }
    print_figures(figures, limit, options.threads)
    goals = judge(figures)
    print_goals(goals)
    if options.record:
        write_figures(
            options.record, threads=options.threads, group=GROUP, shapes=SHAPES,
            busy_cpus_before=busy, busy_cpus_after=busy_cpus(), read_gb_per_s=limit, arms=figures,
            goals=[goal.as_json() for goal in goals],
        )  # fmt: skip
        plot(figures, limit, PLOTS / f"{options.record}.png")
    return 0 if all(goal.is_met for goal in goals) else 1


def print_figures(figures: dict[str, Any], limit: float, threads: int) -> None:
    rows = list(next(iter(figures.values()))["layer_ms"])
    flops = 2 * sum(n * k for n, k in SHAPES.values())
    print(f"\n{threads} thread(s); memory is read at {limit:.1f} GB/s\n")
    print("| | " + " | ".join(f"{r}, ms" for r in rows)
          + f" | GFLOP/s at {rows[-1]} | weights, MB | of read limit | error |")  # fmt: skip
    print("|---|" + "---:|" * (len(rows) + 4))
    for name, figure in figures.items():
        times = " | ".join(f"{figure['layer_ms'][r]:.2f}" for r in rows)
        speed = int(rows[-1]) * flops / figure["layer_ms"][rows[-1]] / 1e6
        share, error = figure["share_of_read_limit"], figure["relative_error"]
        print(
            f"| {name} | {times} | {speed:.0f} | {figure['weights_mb']:.0f} | "
            f"{'' if share is None else f'{share:.0%}'} | "
            f"{'' if error is None else f'{error:.1e}'} |"
        )


def judge(figures: dict[str, Any]) -> list[Goal]:
    ours = figures.get("cpu_native") or figures["cpu_int4"]
    ggml = figures["ggml Q4_0"]["layer_ms"] if "ggml Q4_0" in figures else {}
    times, share = ours["layer_ms"], ours["share_of_read_limit"]
    goals = []
    if share is not None:
        goals.append(Goal("one row, share of the read limit", share, 0.75, least=True))
    if {"1", "4"} <= times.keys():
        ratio = 4 * times["1"] / times["4"]
        goals.append(Goal("four rows / one row, tokens per second", ratio, 1.8, least=True))
    for rows, least in (("1", 1.1), ("640", 1.3)):
        if rows in times and rows in ggml:
            ratio = ggml[rows] / times[rows]
            goals.append(Goal(f"{rows} row(s), ours / ggml Q4_0", ratio, least, least=True))
    return goals


def plot(figures: dict[str, Any], limit: float, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_rows = list(next(iter(figures.values()))["layer_ms"])
    figure, axes = pyplot.subplots(
        1, len(all_rows), figsize=(14, 3.6), layout="constrained", squeeze=False
    )
    names = list(figures)[::-1]
    colours = ["#1f77b4" if name == "cpu_native" else "#b0b7bf" for name in names]
    for axis, rows in zip(axes[0], all_rows, strict=True):
        values = [figures[name]["layer_ms"][rows] for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.set_title(f"{rows} row{'' if rows == '1' else 's'}, ms a layer", fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0, 0]:
            axis.set_yticklabels([])
    ours = figures.get("cpu_native") or figures["cpu_int4"]
    axes[0, 0].axvline(ours["weights_mb"] / limit, color="black", linestyle=":", linewidth=1)
    figure.suptitle("The linears of a Llama-7B layer (dotted: memory alone)", fontsize=11)
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
