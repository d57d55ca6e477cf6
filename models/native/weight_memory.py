"""Memory for weights that every step reads from end to end.

glibc hands out what loading has freed, in the small pages in which that was first touched, and a
product then spends a fifth of its time on address translation. Here each piece is new memory that
asks for huge pages before anything is written to it, and pieces lie side by side.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

REGION_BYTES = 64 << 20
HUGE_PAGE = 2 << 20
ALIGNMENT = 64
"""Bytes: a cache line, and a register."""


class WeightMemory:
    """Regions that are cut into pieces. A region lives as long as a piece of it does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8. What is never written to takes no memory."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if size > len(self._left):
                self._left = _region(max(size, REGION_BYTES))
            piece, self._left = self._left[:size], self._left[size:]
        return piece[:num_bytes]


def _region(num_bytes: int) -> Tensor:
    # Private, since shared memory, Python's default, gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    region = torch.frombuffer(memory, dtype=torch.uint8)
    start = -region.data_ptr() % HUGE_PAGE
    return region[start : start + num_bytes]
