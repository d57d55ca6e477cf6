"""Attention and the head's product on a CPU: our kernels against torch's, in turns.

    python -m benchmarks.cpu_attention [--threads N] [--record NAME]

A layer of 16 heads of 128 (a 1B's) and one of 32 heads that share 8 (an 8B's): single tokens and
prompts' chunks after so many known tokens, whose blocks lie scattered and are more than a cache
holds; torch's way gathers them. And logits of a vocabulary of 32,000. Times are minima over turns;
with one thread the clock is that thread's own, so that other processes' turns on its core do not
count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.machine import busy_cpus
from benchmarks.report import write_figures
from models.command_line import HelpFormatter
from models.language.attention import AttentionBatch, Span, attend
from models.language.kv_cache import KVCache, KVCacheShape
from models.native import kernels

HEADS = ((16, 16), (32, 8))
HEAD_DIM = 128
BLOCK = 16
CHUNKS = ((4096, 1), (3712, 8), (3712, 32), (3712, 64), (2048, 512), (0, 32), (0, 512))
"""(known tokens, rows)."""
LAYERS = 4
HEAD_PRODUCTS = ((32000, 2048), (32000, 4096))
"""(N, K)."""
ROWS = (1, 4, 8, 16, 32, 64)
SECONDS = 2.0
"""Of turns, for each comparison."""
FEWEST_TURNS = 3
LARGEST_DIFFERENCE = 0.05
"""Of the two sides, relative to the largest value; bfloat16 rounds by 0.004."""


@dataclass(frozen=True)
class Comparison:
    what: str
    ours_ms: float
    torch_ms: float
    ours_gflop_per_s: float


def compare(what: str, ours: Sequence[Callable[[], object]],
            others: Sequence[Callable[[], object]], flops: float) -> Comparison:  # fmt: skip
    """Both sides' calls, one after the other; figures are of one call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    least = [float("inf"), float("inf")]
    started, turns = time.monotonic(), 0
    while turns < FEWEST_TURNS or time.monotonic() - started < SECONDS:
        for side, calls in enumerate((ours, others)):
            before = clock()
            for call in calls:
                call()
            least[side] = min(least[side], (clock() - before) / len(calls))
        turns += 1
    result = Comparison(what, 1e3 * least[0], 1e3 * least[1], flops / least[0] / 1e9)
    print(
        f"| {what} | {result.ours_ms:.2f} | {result.torch_ms:.2f} | "
        f"{result.torch_ms / result.ours_ms:.1f} | {result.ours_gflop_per_s:.0f} |",
        flush=True,
    )
    return result


def compare_attention(heads: int, kv_heads: int, context: int, rows: int) -> Comparison:
    shape = KVCacheShape(LAYERS, kv_heads, HEAD_DIM, BLOCK, torch.bfloat16)
    blocks = -(-(context + rows) // BLOCK)
    cpu = torch.device("cpu")
    cache = KVCache(shape, blocks, cpu)
    for vectors in (*cache.keys, *cache.values):
        vectors.normal_()
    span = Span(context, context + rows, torch.randperm(blocks).tolist())
    batch = AttentionBatch.build([span], shape, cpu)
    qkv = torch.randn(rows, heads + 2 * kv_heads, HEAD_DIM).bfloat16()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cos = torch.ones(rows, 1, HEAD_DIM).bfloat16()
    rotation = cos, torch.zeros_like(cos)
    ours, theirs = batch.attend(qkv, rotation, cache, 0), attend(q, k, v, cache, 0, batch)
    if (ours - theirs).abs().max() > LARGEST_DIFFERENCE * theirs.abs().max():
        raise AssertionError(f"{rows} rows after {context}: the two sides compute different things")
    return compare(
        f"{heads} heads / {kv_heads}, {rows} row{'s' * (rows > 1)} after {context}",
        [lambda layer=layer: batch.attend(qkv, rotation, cache, layer) for layer in range(LAYERS)],
        [lambda layer=layer: attend(q, k, v, cache, layer, batch) for layer in range(LAYERS)],
        4 * heads * HEAD_DIM * rows * (context + (rows + 1) / 2),
    )


def compare_head(n: int, k: int, rows: int) -> Comparison:
    library = kernels()
    assert library is not None
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(rows, k).bfloat16()
    return compare(
        f"head {n} x {k}, {rows} row{'s' * (rows > 1)}",
        [lambda: library.dense_matmul(x, weight)],
        [lambda: F.linear(x, weight).float()],
        2 * rows * n * k,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_attention", description=__doc__,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    if kernels() is None:
        print("there are no kernels of ours on this machine", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    busy = busy_cpus()
    print("| | ours, ms | torch, ms | ratio | ours, GFLOP/s |\n|---|---:|---:|---:|---:|")
    with torch.inference_mode():
        results = [
            *(compare_attention(*heads, *chunk) for heads in HEADS for chunk in CHUNKS),
            *(compare_head(n, k, rows) for n, k in HEAD_PRODUCTS for rows in ROWS),
        ]
    if options.record:
        write_figures(
            options.record, threads=options.threads, busy_cpus_before=busy,
            busy_cpus_after=busy_cpus(), comparisons=[asdict(result) for result in results],
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
