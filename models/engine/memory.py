"""What to do when a device's memory is full."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""A GPU's allocator raises the one, numpy and our own kernels the other. What torch raises on a CPU
is no type of its own; there the kernel ends processes long before an allocation fails."""


def release_memory() -> None:
    """Gives back what torch keeps of a GPU for later. In pieces of other sizes it may be enough."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
