"""Ways to multiply with 4-bit weights. Each packs the canonical form for itself, at load."""

from __future__ import annotations

import torch

from models.awq.backends.base import Backend
from models.awq.backends.cpu_int4 import CpuInt4
from models.awq.backends.cpu_int4_bf16 import CpuInt4Bf16
from models.awq.backends.cpu_native import CpuNative
from models.awq.backends.cuda import CANDIDATES, CHOICE
from models.awq.backends.reference import Reference
from models.errors import ConfigurationError
from models.native import kernels
from models.registry import Registry

BACKENDS: Registry[Backend] = Registry("W4A16 backend", ConfigurationError)
BACKENDS.register("reference", Reference())
BACKENDS.register("cpu_int4", CpuInt4())
BACKENDS.register("cpu_int4_bf16", CpuInt4Bf16())
BACKENDS.register("cpu_native", CpuNative())
for _name, _backend in CANDIDATES.items():
    BACKENDS.register(_name, _backend)


def select_backend(device: torch.device, dtype: torch.dtype, *, bf16_copy: bool = False) -> str:
    """The name of the fastest backend for activations of `dtype` on `device`.

    On a GPU that is `CHOICE`, which each layer replaces by what is fastest for its shape.

    Args:
        bf16_copy: there is memory for a copy of the weights in 16 bits, should one be of use.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        if kernels():
            return "cpu_native"
        # torch's other dtypes are some 60 times slower.
        return "cpu_int4_bf16" if bf16_copy else "cpu_int4"
    if device.type == "cuda" and dtype in {torch.float16, torch.bfloat16}:
        return CHOICE
    return "reference"


__all__ = ["BACKENDS", "CHOICE", "Backend", "select_backend"]
