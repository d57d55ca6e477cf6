"""glibc's allocator, told to keep what one step frees for the next."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc takes no larger one; blocks beyond it are mapped and given back each time."""


def keep_freed_memory(num_bytes: int = KEPT_BYTES) -> None:
    """From now on up to `num_bytes` of freed memory stay with the process.

    Left alone, glibc gives megabytes of activations back to the kernel after each product, and the
    next one faults them in again, page by page: ten times the product's own time at 32 sequences.
    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    if not mallopt(M_TRIM_THRESHOLD, num_bytes):
        logger.debug("the C library does not keep freed memory")
