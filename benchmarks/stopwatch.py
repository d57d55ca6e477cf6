"""Seconds of something computed on a device, by that device's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LEAST_S = 2e-3
"""What is quicker is done several times between two readings: an event costs microseconds."""


class Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def once(self, work: Callable[[], object], times: int = 1) -> float:
        """Seconds of doing it so many times, one after the other."""
        if self._device.type != "cuda":
            before = time.perf_counter()
            for _ in range(times):
                work()
            return time.perf_counter() - before
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def best(self, work: Callable[[], object], repeats: int = 5) -> float:
        """The least of several readings, for each time that it is done. It is done once before,
        which is not counted."""
        self.once(work)
        times = max(1, round(LEAST_S / max(self.once(work), 1e-6)))
        return min(self.once(work, times) for _ in range(repeats)) / times
