"""Whether Triton's kernels can run where a tensor lies."""

from __future__ import annotations

import functools
import importlib.util

import torch

OLDEST = (8, 0)
"""Compute capability. Older tensor cores have no bfloat16."""


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether kernels of ours run on `device`; elsewhere torch's expressions compute the same."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= OLDEST
    )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """1 where there are none."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
