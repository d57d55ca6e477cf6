"""Which backend computes a layer on a GPU, and how, for each number of rows.

Nothing is taken for fast that was not measured: `choose` looks a layer's shape up in the timings,
measures what it lacks, and keeps that. A layer is packed for one backend only, since weights in two
orders would take twice the memory, which as KV cache serves more requests than the better of two
kernels does; so the backend is the one that is best over all numbers of rows, few rows first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.backends.timings import Timing, Timings, layer_key
from models.awq.quantized_weight import QuantizedWeight

logger = logging.getLogger(__name__)

ROWS = tuple(1 << power for power in range(13))
"""Numbers of rows that are measured, 1 to 4,096; others take the next larger one's plan."""
MEASURING_SECONDS = 120.0
"""In one process, for all shapes together. What is left is measured at the next start."""


class Chosen(Backend):
    """One backend, with the plan for each number of rows."""

    def __init__(self, backend: Backend, plans: Mapping[int, str]) -> None:
        """
        Args:
            plans: by number of rows, as in ROWS; the backend's own where there is none.
        """
        self._backend = backend
        self.plans_by_rows = dict(plans)

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        return self._backend.unsupported(shape, device, dtype)

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        return self._backend.pack(weight, device, dtype)

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        plan = self.plans_by_rows.get(rows_measured(x.shape[0]))
        if plan is None:
            return self._backend.matmul(x, packed, shape)
        return self._backend.run(plan, x, packed, shape)


class Measure(Protocol):
    def __call__(
        self,
        backends: Mapping[str, Backend],
        shape: Shape,
        rows: Iterable[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Iterator[tuple[int, dict[str, Timing]]]:
        """For one number of rows after the other the fastest plan of each backend.

        A backend that fails or computes something else is left out.
        """


class Chooser:
    """For one kind of GPU."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        timings: Timings,
        measure: Measure,
        *,
        seconds: float = MEASURING_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            backends: in the order in which to take them unmeasured.
            seconds: of measuring, all in all.
        """
        self._backends = backends
        self._timings = timings
        self._measure = measure
        self._seconds_left = seconds
        self._clock = clock
        self._told: set[str] = set()

    def choose(
        self, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> list[tuple[str, Backend]]:
        """Backends that can do such a layer, the best first.

        The others are for the case that it turns out, when the weights are packed, that it cannot.
        """
        able = {
            name: backend
            for name, backend in self._backends.items()
            if backend.unsupported(shape, device, dtype) is None
        }
        key = layer_key(shape, dtype)
        if not able and key not in self._told:
            self._told.add(key)
            reasons = (
                f"{n}: {b.unsupported(shape, device, dtype)}" for n, b in self._backends.items()
            )
            logger.warning("no fast backend can do %s: %s", key, "; ".join(reasons))
        known = self._timings.of(shape, dtype)
        if len(able) > 1 or any(len(b.plans(shape, 1, device)) > 1 for b in able.values()):
            self._measure_missing(able, shape, device, dtype, known)
        ranked = rank(able, known)
        if ranked and key not in self._told:
            self._told.add(key)
            logger.info("%s is computed by %s", key, ranked[0])
        return [
            (name, Chosen(able[name], {r: t[name].plan for r, t in known.items() if name in t}))
            for name in ranked
        ]

    def _measure_missing(
        self,
        backends: Mapping[str, Backend],
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        known: dict[int, dict[str, Timing]],
    ) -> None:
        missing = [rows for rows in ROWS if rows not in known]
        if not missing or self._seconds_left <= 0:
            return
        logger.info("measuring %s: %s", layer_key(shape, dtype), ", ".join(backends))
        started = self._clock()
        try:
            for rows, timings in self._measure(backends, shape, missing, device, dtype):
                known[rows] = timings
                if self._clock() - started > self._seconds_left:
                    break
        except torch.OutOfMemoryError as error:
            logger.warning("there is no memory to measure %s: %s", layer_key(shape, dtype), error)
        self._seconds_left -= self._clock() - started
        done = sum(rows in known for rows in missing)
        logger.info(
            "measured %s for %d of %d numbers of rows in %.1f s",
            layer_key(shape, dtype), done, len(missing), self._clock() - started,
        )  # fmt: skip
        if self._seconds_left <= 0 and done < len(missing):
            logger.warning("the time for measuring is up; the rest is measured at the next start")
        self._timings.save()


def rank(names: Iterable[str], timings: Mapping[int, Mapping[str, Timing]]) -> list[str]:
    """The best first: by how much longer than the fastest each takes, on geometric average.

    Numbers of rows count by their share of a server's time: 1 to 64 are what every token's step
    has, more come once for each prompt, and count half. One that has no timing at all comes last,
    in the order given; so does, among those that have, one that lacks some.
    """
    order = list(names)

    def cost(name: str) -> tuple[int, float]:
        missing, weights, total = 0, 0.0, 0.0
        for rows, by_name in timings.items():
            among = [timing.microseconds for each, timing in by_name.items() if each in order]
            if name not in by_name:
                missing += bool(among)
                continue
            weight = 1.0 if rows <= 64 else 0.5
            weights += weight
            total += weight * math.log(by_name[name].microseconds / min(among))
        return missing, total / weights if weights else math.inf

    return sorted(order, key=cost)


def rows_measured(rows: int) -> int:
    """The least of ROWS that is as many, or the largest."""
    return min(1 << max(rows - 1, 0).bit_length(), ROWS[-1])
