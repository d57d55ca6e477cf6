"""Our own Triton kernels (`models/gpu/w4a16.py`): fp16 and bf16, any number of rows.

One packed form serves all of its kernels: one for a single row, one for some rows, on the tensor
cores; and for prompts the weights are widened to 16 bits and multiplied by cuBLAS.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.backends.self_check import check_product, failures_as_mismatch
from models.awq.quantized_weight import QuantizedWeight
from models.gpu import w4a16
from models.gpu.w4a16 import Plan, Weights

CHECKED_ROWS = (1, 5, 2 * w4a16.DENSE_ROWS)
"""One for each kernel."""


class CudaTriton(Backend):
    """Buffers: those of `models.gpu.w4a16.Weights`."""

    def __init__(self, *, thorough: bool = False) -> None:
        """
        Args:
            thorough: propose more plans than a start has time to measure.
        """
        self._thorough = thorough

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16}:
            return f"it runs float16 and bfloat16 on a GPU only, not {dtype} on {device.type}"
        if not find_spec("triton"):
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 (Ampere) or later"
        if w4a16.Grouping.of(shape.in_features, shape.group_size) is None:
            return f"groups of {shape.group_size} do not fit into chunks of {w4a16.CHUNK}"
        return None

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        packed = w4a16.pack(
            weight.q.to(device), weight.scale.to(device), weight.zero.to(device), weight.group_size
        )._asdict()
        with failures_as_mismatch("triton"):  # it needs a C compiler, for example
            check_product(self, packed, weight, device, dtype, CHECKED_ROWS)
        return packed

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        plan = _default(x.shape[0], shape, _processors(x.device))
        return w4a16.matmul(x, Weights(**packed), shape.in_features, shape.group_size, plan)

    def plans(self, shape: Shape, rows: int, device: torch.device) -> tuple[str, ...]:
        n, k, _ = shape
        plans = w4a16.plans(rows, n, k, _processors(device), thorough=self._thorough)
        return tuple(map(str, plans))

    def run(self, plan: str, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        weights = Weights(**packed)
        return w4a16.matmul(x, weights, shape.in_features, shape.group_size, Plan.parse(plan))


@functools.lru_cache(maxsize=4096)
def _default(rows: int, shape: Shape, processors: int) -> Plan:
    return w4a16.plans(rows, shape.out_features, shape.in_features, processors)[0]


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter's
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
