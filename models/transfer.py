"""Small data between here and a device, without waiting for what the device has to do.

torch's plain copies do wait: `torch.tensor(..., device=...)` and `.to(device)` return when all
earlier work of the device's stream has been done, which leaves it idle until more has been handed
to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(
    values: Tensor | NDArray[Any] | Any, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of them on the device, behind what is queued there. On a CPU a tensor or an array
    may be returned as it is; elsewhere `values` may change afterwards.

    Args:
        values: a tensor of the CPU's, an array, or numbers as `torch.tensor` takes them.
    """
    if isinstance(values, Tensor):
        here = values
    elif isinstance(values, np.ndarray):
        here = torch.from_numpy(values)
    else:
        here = torch.tensor(values, dtype=dtype)  # not by way of float32
    if device.type != "cpu":
        # From page-locked memory, or the driver would wait while it copies larger ones.
        here = here.pin_memory().to(device, non_blocking=True)
    return here if dtype is None else here.to(dtype)


class Download:
    """A copy that is under way, behind what is queued on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._here = tensor
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._here.copy_(tensor, non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record(torch.cuda.current_stream(tensor.device))

    def fetch(self) -> Tensor:
        """Waits for it; on the CPU."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._here
