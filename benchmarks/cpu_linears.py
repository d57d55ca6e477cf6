"""The 4-bit linears of a CPU, by the number of rows: torch's int4 product against bfloat16.

    python -m benchmarks.cpu_linears [--threads N] [--record NAME]

Shapes are the fused layers of the demo model, of a 1B and of a 7B Llama. Times are minima over
repeats; both products take turns. It says where `cpu_int4_bf16` should change from one to the
other, and what share of the memory's speed one row reaches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.report import write_figures
from models.command_line import HelpFormatter

SHAPES = {
    "demo qkv": (768, 256), "demo gate-up": (1024, 256), "demo down": (256, 512),
    "1B qkv": (6144, 2048), "1B gate-up": (11008, 2048), "1B down": (2048, 5504),
    "7B qkv": (12288, 4096), "7B o": (4096, 4096), "7B gate-up": (22016, 4096),
    "7B down": (4096, 11008),
}  # fmt: skip
"""(N, K)."""
ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 512)
"""12 is where `cpu_int4_bf16` changes from one to the other."""
GROUP = 128
SECONDS = 0.3
"""Of repeats, for each product of each shape and number of rows."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds; `int4_gb_per_s` is what the int4 product reads of packed weights."""

    layer: str
    rows: int
    int4_ms: float
    bf16_ms: float
    int4_gb_per_s: float


def measure(layer: str, n: int, k: int) -> list[Timing]:
    import torch
    import torch.nn.functional as F

    from models.awq import quantize_rtn
    from models.awq.backends.base import Shape
    from models.awq.backends.cpu_int4 import CpuInt4

    weight = quantize_rtn(torch.randn(n, k) / k**0.5, GROUP)
    shape, backend = Shape.of(weight), CpuInt4()
    packed = backend.pack(weight, torch.device("cpu"), torch.bfloat16)
    wide = weight.dequantize(torch.bfloat16)
    num_bytes = sum(tensor.nbytes for tensor in packed.values())
    timings = []
    for rows in ROWS:
        x = torch.randn(rows, k).bfloat16()
        int4, bf16 = in_turns(
            lambda x=x: backend.matmul(x, packed, shape), lambda x=x: F.linear(x, wide)
        )
        timings.append(Timing(layer, rows, int4 * 1e3, bf16 * 1e3, num_bytes / int4 / 1e9))
    return timings


def in_turns(*products: Callable[[], object]) -> list[float]:
    """Seconds of each, the least of its turns."""
    for product in products:
        product()
    best = [float("inf")] * len(products)
    started, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - started < SECONDS * len(products):
        for index, product in enumerate(products):
            before = time.perf_counter()
            product()
            best[index] = min(best[index], time.perf_counter() - before)
        turns += 1
    return best


def read_speed() -> float:
    """GB/s: the sum over a gigabyte of 64-bit integers, the best of several."""
    import torch

    data = torch.ones(1 << 27, dtype=torch.int64)
    (seconds,) = in_turns(data.sum)
    return data.nbytes / seconds / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_linears", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as torch takes")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    import torch
    from tqdm import tqdm

    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    limit = read_speed()
    timings = [t for layer, (n, k) in tqdm(SHAPES.items(), "layers") for t in measure(layer, n, k)]
    print(f"{threads} thread(s); the memory is read at {limit:.1f} GB/s\n")
    print("bf16's time over int4's: above 1 the 4-bit product is faster\n")
    print("| layer | " + " | ".join(f"{rows}" for rows in ROWS) + " | one row, share of limit |")
    print("|---|" + "---:|" * (len(ROWS) + 1))
    for layer in SHAPES:
        own = [timing for timing in timings if timing.layer == layer]
        ratios = " | ".join(f"{timing.bf16_ms / timing.int4_ms:.2f}" for timing in own)
        print(f"| {layer} | {ratios} | {own[0].int4_gb_per_s / limit:.0%} |")
    if options.record:
        write_figures(
            options.record, threads=threads, group=GROUP, read_gb_per_s=limit,
            timings=[asdict(timing) for timing in timings],
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
