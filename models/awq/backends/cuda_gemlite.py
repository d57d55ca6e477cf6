"""gemlite's Triton kernels, where that package is installed (`pip install gemlite`).

Written from gemlite 0.6's sources: `A16W4_HQQ_INT.from_weights` packs `(q - zeros) * scales`, and
the operator `forward_functional` multiplies with the module's tensors and numbers. It tunes itself
at the first product of each number of rows, which `warm_up_linears` sees to.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.backends.self_check import check_product, failures_as_mismatch
from models.awq.quantized_weight import QuantizedWeight

K_MULTIPLE = 32
SMALLEST_GROUP = 16
CHECKED_ROWS = (1, 16, 64)
"""One for each of its kernels."""


class CudaGemlite(Backend):
    """Buffers: W_q (K / 8, N) int32, scales and zeros (K / G, N), meta_scale; the module's own.

    What else a product needs are the same few numbers for every layer of a shape and dtype.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[Shape, torch.dtype], list[int]] = {}

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16}:
            return f"it runs float16 and bfloat16 on a GPU only, not {dtype} on {device.type}"
        if not find_spec("gemlite"):
            return "gemlite is not installed"
        if shape.in_features % K_MULTIPLE:
            return f"the number of inputs, {shape.in_features}, is no multiple of {K_MULTIPLE}"
        if shape.group_size < SMALLEST_GROUP:
            return f"groups of {shape.group_size} are smaller than {SMALLEST_GROUP}"
        return None

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        with failures_as_mismatch("gemlite"):
            from gemlite.helper import A16W4_HQQ_INT

            module = A16W4_HQQ_INT(device=str(device), dtype=dtype).from_weights(
                weight.q.to(device), weight.scale.to(device, dtype), weight.zero.to(device, dtype)
            )
            names = ("W_q", "scales", "zeros", "meta_scale")
            packed = dict(zip(names, map(_data, module.get_tensor_args()), strict=True))
            self._numbers[Shape.of(weight), dtype] = module.get_meta_args()
            check_product(self, packed, weight, device, dtype, CHECKED_ROWS)
        return packed

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        from gemlite.core import forward_functional

        tensors = [packed[name] for name in ("W_q", "scales", "zeros", "meta_scale")]
        with torch.cuda.device_of(x):
            out: Tensor = forward_functional(x, None, tensors, self._numbers[shape, x.dtype])
        return out


def _data(tensor: Any) -> Tensor:
    return tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
