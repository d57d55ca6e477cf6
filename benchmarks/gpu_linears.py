"""The 4-bit linears of a GPU, by the number of rows: every backend that is there, beside 16 bits.

    python -m benchmarks.gpu_linears [--shapes 3B 7B 13B] [--record NAME] [--tuned]

For each fused layer of VILA1.5-3B, LLaVA-1.5-7B and 13B: the fastest plan of every backend, how far
its product is from the exact one, and what share it reaches of the limit, which is the larger of
bytes over the memory's speed and operations over the tensor cores', both measured here. Weights are
read from memory, not out of the GPU's cache. With `--tuned` the timings become the file that a
server on such a GPU starts with.

`--device cpu --shapes small` runs the same with the backends of CPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import write_figures
from models.command_line import HelpFormatter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.awq import QuantizedWeight
    from models.awq.backends import Backend
    from models.awq.backends.base import Packed, Shape
    from models.awq.backends.timings import Layers

SHAPES = {
    "small": {"qkv": (768, 256), "down": (256, 512)},
    "3B": {
        "qkv": (7680, 2560), "o": (2560, 2560), "gate-up": (13824, 2560), "down": (2560, 6912),
    },
    "7B": {
        "qkv": (12288, 4096), "o": (4096, 4096), "gate-up": (22016, 4096), "down": (4096, 11008),
    },
    "13B": {
        "qkv": (15360, 5120), "o": (5120, 5120), "gate-up": (27648, 5120), "down": (5120, 13824),
    },
}  # fmt: skip
"""(N, K) by model and layer."""
GROUP = 128
DENSE = "16 bits"
"""The arm without quantisation."""


@dataclass(frozen=True)
class Limits:
    """Of the device, as measured: a copy's reads and writes, and a large 16-bit product."""

    bytes_per_s: float
    operations_per_s: float

    def seconds(self, num_bytes: float, operations: float) -> float:
        return max(num_bytes / self.bytes_per_s, operations / self.operations_per_s)


@dataclass(frozen=True)
class Product:
    """One cell of the result.

    Attributes:
        error: the largest, relative to the product's largest value.
        gb_per_s: of weights as they are packed, and of inputs and outputs.
        share: of the limit that holds for 4-bit weights.
    """

    model: str
    layer: str
    out_features: int
    in_features: int
    dtype: str
    rows: int
    backend: str
    plan: str
    microseconds: float
    error: float
    gb_per_s: float
    tflop_per_s: float
    share: float


def measure(
    models: Iterable[str],
    rows: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    backends: Mapping[str, Backend],
    limits: Limits,
) -> Iterator[Product]:
    """One layer after the other, each number of rows by each backend, 16-bit weights among them.

    Args:
        models: of SHAPES.
    """
    for model in models:
        for layer, (n, k) in SHAPES[model].items():
            yield from _measure_layer(model, layer, n, k, rows, device, dtype, backends, limits)


def _measure_layer(
    model: str, layer: str, n: int, k: int, rows: Sequence[int], device: torch.device,
    dtype: torch.dtype, backends: Mapping[str, Backend], limits: Limits,
) -> Iterator[Product]:  # fmt: skip
    import torch

    from models.awq.backends.base import BackendMismatch, Shape
    from models.awq.backends.measuring import copies, fastest, random_weight

    shape = Shape(n, k, GROUP)
    weight = random_weight(shape, device)
    arms = {
        DENSE: dense_backend(),
        **{name: b for name, b in backends.items() if not b.unsupported(shape, device, dtype)},
    }
    forms = {}
    for name, backend in arms.items():
        try:
            forms[name] = copies(backend.pack(weight, device, dtype), device)
        except BackendMismatch as mismatch:
            print(f"{name}: {mismatch}", file=sys.stderr)
    exact = weight.dequantize(torch.float32)
    ideal_bytes = n * k / 2 + n * k / GROUP * 2.5
    generator = torch.Generator(device).manual_seed(1)  # torch's own is lost with a failed capture
    for count in rows:
        x = torch.randn(count, k, device=device, generator=generator).to(dtype)
        expected = x.float() @ exact.T
        moved = (count * (n + k)) * dtype.itemsize
        operations = 2.0 * count * n * k
        for name, packed in forms.items():
            found = fastest(name, arms[name], packed, shape, x, expected, _stopwatch(device))
            if found is None:
                continue
            got = arms[name].run(found.plan, x, packed[0], shape).float()
            seconds = found.microseconds / 1e6
            num_bytes = sum(tensor.nbytes for tensor in packed[0].values()) + moved
            yield Product(
                model, layer, n, k, str(dtype).removeprefix("torch."), count, name, found.plan,
                found.microseconds,
                error=float((got - expected).abs().max() / expected.abs().max()),
                gb_per_s=num_bytes / seconds / 1e9,
                tflop_per_s=operations / seconds / 1e12,
                share=limits.seconds(ideal_bytes + moved, operations) / seconds,
            )  # fmt: skip


def dense_backend() -> Backend:
    """Weights in 16 bits and torch's own product."""
    import torch.nn.functional as F

    from models.awq.backends import Backend

    class Dense(Backend):
        def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
            return None

        def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
            return {"weight": weight.dequantize(dtype)}

        def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
            return F.linear(x, packed["weight"])

    return Dense()


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    import torch

    large = device.type == "cuda"
    source = torch.ones(1 << (30 if large else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    stopwatch = _stopwatch(device)
    return Limits(
        2 * source.nbytes / stopwatch([lambda: target.copy_(source)], 1),
        2.0 * size**3 / stopwatch([lambda: a @ b], size),
    )


def timings_of(products: Iterable[Product]) -> Layers:
    """As `models.awq.backends.timings` keeps them."""
    import torch

    from models.awq.backends.base import Shape
    from models.awq.backends.timings import Timing, layer_key

    layers: Layers = {}
    for product in products:
        if product.backend != DENSE:
            shape = Shape(product.out_features, product.in_features, GROUP)
            key = layer_key(shape, getattr(torch, product.dtype))
            by_rows = layers.setdefault(key, {}).setdefault(product.rows, {})
            by_rows[product.backend] = Timing(product.plan, product.microseconds)
    return layers


def print_table(products: Sequence[Product]) -> None:
    """In Markdown: microseconds, and the share of the limit."""
    rows = sorted({product.rows for product in products})
    print("\nmicroseconds (share of the limit, %)\n")
    print("| layer | backend | " + " | ".join(map(str, rows)) + " | largest error |")
    print("|---|---|" + "---:|" * (len(rows) + 1))
    arms: dict[tuple[str, ...], dict[int, Product]] = {}
    for product in products:
        arm = (f"{product.model} {product.layer} {product.dtype}", product.backend)
        arms.setdefault(arm, {})[product.rows] = product
    for arm, cells in arms.items():
        shown = (
            f"{c.microseconds:.1f} ({c.share * 100:.0f})" if (c := cells.get(n)) else "-"
            for n in rows
        )
        error = max(cell.error for cell in cells.values())
        print(f"| {' | '.join(arm)} | {' | '.join(shown)} | {error:.1e} |")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    import torch
    from tqdm import tqdm

    from models.awq.backends import BACKENDS
    from models.awq.backends.choice import ROWS
    from models.awq.backends.cuda_triton import CudaTriton
    from models.awq.backends.timings import TUNED, Environment, write

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    backends = {name: BACKENDS[name] for name in options.backends or BACKENDS}
    if options.thorough and "cuda_triton" in backends:
        backends["cuda_triton"] = CudaTriton(thorough=True)
    torch.manual_seed(0)
    products, limits = [], {}
    with torch.inference_mode():
        for name in options.dtype:
            dtype = getattr(torch, name)
            limits[name] = measure_limits(device, dtype)
            print(
                f"{name}: {limits[name].bytes_per_s / 1e9:.0f} GB/s copied, "
                f"{limits[name].operations_per_s / 1e12:.1f} TFLOP/s multiplied"
            )
            found = measure(
                options.shapes, options.rows or ROWS, device, dtype, backends, limits[name]
            )
            products += tqdm(found, "products")
    print_table(products)
    environment = Environment.of(device)
    if options.record:
        write_figures(
            options.record, gpu=environment.gpu, packages=environment.packages, group=GROUP,
            limits={name: asdict(limit) for name, limit in limits.items()},
            products=[asdict(product) for product in products],
        )  # fmt: skip
    if options.tuned is not None:
        path = Path(options.tuned or TUNED) / environment.file_name
        write(path, environment, timings_of(products))
        print(path)
    return 0


def _stopwatch(device: torch.device) -> Callable[[Sequence[Callable[[], object]], int], float]:
    from models.awq.backends.measuring import time_on_cpu, time_on_gpu

    return time_on_gpu if device.type == "cuda" else time_on_cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_linears", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["3B", "7B", "13B"],
        help="of which model's layers",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=int, help="default: 1, 2, 4, ... 4096")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float16", "bfloat16"], default=["float16", "bfloat16"],
        help="of activations",
    )  # fmt: skip
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can")
    parser.add_argument(
        "--thorough", action="store_true", help="try more of our own kernels' plans"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    parser.add_argument(
        "--tuned", metavar="FOLDER", nargs="?", const="",
        help="write the timings that a server starts with; default: models/gpu/tuned",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
