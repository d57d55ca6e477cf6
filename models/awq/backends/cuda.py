"""The backends of GPUs, and the choice among them.

Unmeasured, they are taken in this order. Our own kernels come first because they need nothing that
torch does not bring along, take both 16-bit types, and are checked against the weights like all;
then torch's. What is installed besides comes last, until it is measured to be faster.
"""

from __future__ import annotations

import os

import torch

from models.awq.backends.base import Backend, Shape
from models.awq.backends.choice import MEASURING_SECONDS, Chooser
from models.awq.backends.cuda_gemlite import CudaGemlite
from models.awq.backends.cuda_humming import CudaHumming
from models.awq.backends.cuda_int4 import CudaInt4
from models.awq.backends.cuda_triton import CudaTriton
from models.awq.backends.measuring import measure
from models.awq.backends.timings import Environment, Timings
from models.errors import ConfigurationError

CHOICE = "cuda"
"""In place of a backend's name: whichever is fastest for the layer."""
CANDIDATES: dict[str, Backend] = {
    "cuda_triton": CudaTriton(),
    "cuda_int4": CudaInt4(),
    "cuda_humming": CudaHumming(),
    "cuda_gemlite": CudaGemlite(),
}
LIMIT = "TINYCHAT_W4A16_SECONDS"
"""Environment variable: how long a start may measure; 0: not at all."""


def choose(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Backend]]:
    """Backends for such a layer on a GPU, the best first. Measures, the first time.

    Raises:
        ConfigurationError: TINYCHAT_W4A16_SECONDS is no number.
    """
    return _chooser(torch.cuda.get_device_name(device), device).choose(shape, device, dtype)


_choosers: dict[str, Chooser] = {}


def _chooser(gpu: str, device: torch.device) -> Chooser:
    """One for all GPUs of a kind."""
    if gpu not in _choosers:
        timings = Timings.load(Environment.of(device))
        _choosers[gpu] = Chooser(CANDIDATES, timings, measure, seconds=_limit())
    return _choosers[gpu]


def _limit() -> float:
    text = os.environ.get(LIMIT, str(MEASURING_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{LIMIT} is {text!r}; it must be a number of seconds") from None
