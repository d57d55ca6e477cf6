"""How long products take: on random weights of a layer's shape, out of a cache that is cold."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.backends.base import Backend, BackendMismatch, Packed, Shape
from models.awq.backends.self_check import LARGEST_ERROR
from models.awq.backends.timings import Timing
from models.awq.quantized_weight import MAX_Q, QuantizedWeight

logger = logging.getLogger(__name__)

GRAPH_ROWS = 64
"""Up to here a plan that cannot be captured in a CUDA graph is none: decode steps are."""
MOST_COPIES = 32
CALLS = 16
"""In a measurement at least, one after the other."""
REPEATS = 5
"""Of a measurement, of which the shortest counts."""

Stopwatch: TypeAlias = Callable[[Sequence[Callable[[], object]], int], float]
"""(products to call one after the other, their rows) -> seconds of one. Raises what they raise."""


def measure(
    backends: Mapping[str, Backend],
    shape: Shape,
    rows: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    stopwatch: Stopwatch | None = None,
) -> Iterator[tuple[int, dict[str, Timing]]]:
    """For one number of rows after the other, the fastest plan of each backend.

    A backend or plan that fails, or computes something else than the weights say, is left out.

    Args:
        stopwatch: default: a GPU's.

    Raises:
        torch.OutOfMemoryError
    """
    stopwatch = stopwatch or time_on_gpu
    weight = random_weight(shape, device)
    forms = {}
    for name, backend in backends.items():
        try:
            forms[name] = copies(backend.pack(weight, device, dtype), device)
        except BackendMismatch as mismatch:
            logger.warning("%s is not measured: %s", name, mismatch)
    wide = weight.dequantize(dtype)
    del weight
    generator = torch.Generator(device).manual_seed(1)  # torch's own is lost with a failed capture
    for count in rows:
        x = torch.randn(count, shape.in_features, device=device, generator=generator).to(dtype)
        expected = F.linear(x, wide).float()
        timings = {}
        for name, packed in forms.items():
            found = fastest(name, backends[name], packed, shape, x, expected, stopwatch)
            if found is not None:
                timings[name] = found
        logger.info("%d x %d, %d row(s): %s", *shape[:2], count, _summary(timings))
        yield count, timings


@torch.inference_mode()
def time_on_gpu(calls: Sequence[Callable[[], object]], rows: int) -> float:
    """Seconds of one call, without what the CPU takes to launch it."""
    for call in calls:
        call()  # compiles, tunes, fills the allocator
    torch.cuda.synchronize()
    turns = math.ceil(CALLS / len(calls))

    def run() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    here = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_capture_stream(here.device)):
            run()
        run = graph.replay
    except RuntimeError:
        if rows <= GRAPH_ROWS:
            raise
    finally:
        torch.cuda.set_stream(here)  # torch stays on the capture's where that has failed
    run()
    shortest = math.inf
    for _ in range(REPEATS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run()
        ended.record()
        ended.synchronize()
        shortest = min(shortest, started.elapsed_time(ended))
    return shortest / 1e3 / (turns * len(calls))


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, since each has a workspace of cuBLAS's; torch's own lies on one device only."""
    return torch.cuda.Stream(device)


def time_on_cpu(calls: Sequence[Callable[[], object]], _: int) -> float:
    """Seconds of one call."""
    for call in calls:
        call()
    shortest = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        for call in calls:
            call()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest / len(calls)


def random_weight(shape: Shape, device: torch.device) -> QuantizedWeight:
    """Made where it will be used: numbers of this size take seconds on a CPU."""
    n, k, group = shape
    generator = torch.Generator(device).manual_seed(0)
    size = {"device": device, "dtype": torch.uint8, "generator": generator}
    return QuantizedWeight(
        torch.randint(0, MAX_Q + 1, (n, k), **size),  # type: ignore[call-overload]
        torch.rand(n, k // group, device=device, generator=generator)
        .add_(0.5)
        .div_(8 * k**0.5)
        .half(),
        torch.randint(0, MAX_Q + 1, (n, k // group), **size),  # type: ignore[call-overload]
        group,
    )


def copies(packed: Packed, device: torch.device) -> list[Packed]:
    """As many as do not fit the GPU's cache together, so that each is read from memory."""
    num_bytes = sum(tensor.nbytes for tensor in packed.values())
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(MOST_COPIES, max(2, math.ceil(2 * cache / num_bytes)))
    clones = [{name: t.clone() for name, t in packed.items()} for _ in range(count - 1)]
    return [packed, *clones]


def fastest(
    name: str,
    backend: Backend,
    packed: Sequence[Packed],
    shape: Shape,
    x: Tensor,
    expected: Tensor,
    stopwatch: Stopwatch,
) -> Timing | None:
    """The fastest plan of a backend for so many rows as x has, or None: it can do none of them.

    Args:
        name: for the log.
        packed: copies of its weights, which are read in turns.
        expected: the product, float32.
    """
    rows, best = x.shape[0], None
    for plan in backend.plans(shape, rows, x.device):
        try:
            got = backend.run(plan, x, packed[0], shape).float()
            error = (got - expected).abs().max()
            if not bool(error <= LARGEST_ERROR * expected.abs().max()):
                logger.error("%s (%s) computes something else for %d row(s)", name, plan, rows)
                continue
            calls = [
                lambda buffers=buffers, plan=plan: backend.run(plan, x, buffers, shape)  # type: ignore[misc]
                for buffers in packed
            ]
            with torch.cuda.device_of(x):
                microseconds = stopwatch(calls, rows) * 1e6
        except torch.OutOfMemoryError:
            raise  # says nothing about the plan
        except Exception as failure:  # of a compiler, of the GPU, of another's package
            logger.warning("%s (%s) fails for %d row(s): %s", name, plan, rows, failure)
            continue
        if best is None or microseconds < best.microseconds:
            best = Timing(plan, round(microseconds, 2))
    return best


def _summary(timings: Mapping[str, Timing]) -> str:
    parts = [f"{name} {t.microseconds:.1f} us {t.plan}".rstrip() for name, t in timings.items()]
    return "; ".join(parts) or "nothing could do it"
