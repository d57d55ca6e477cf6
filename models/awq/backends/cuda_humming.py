"""humming's kernels, where that package is installed (`pip install humming-kernels`).

Written from humming-kernels 0.1.19's sources: weights, scales and zero points are packed as
`AWQWeightSchema` packs them, `prepare_and_transform_humming_tensors` brings them into the kernels'
order, and `humming_forward` multiplies. Kernels are compiled at the first product, by nvrtc and the
headers of a CUDA toolkit or of NVIDIA's wheels; without these its first use fails, and another
backend takes the layer.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.backends.self_check import check_product, failures_as_mismatch
from models.awq.quantized_weight import BITS, QuantizedWeight

N_MULTIPLE, K_MULTIPLE = 64, 32
LOCKS = 2048
"""int32, of a layer; as many as `HummingLayer` has."""
CHECKED_ROWS = (1, 16, 256)


class CudaHumming(Backend):
    """Buffers: weight, weight_scale and zero_point in humming's order; locks (2048,) int32.

    The configuration that a product needs is the same for every layer of a shape and dtype.
    """

    def __init__(self) -> None:
        self._configurations: dict[tuple[Shape, torch.dtype, torch.device], Any] = {}

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16}:
            return f"it runs float16 and bfloat16 on a GPU only, not {dtype} on {device.type}"
        if not find_spec("humming"):
            return "humming-kernels is not installed"
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            return "bfloat16 needs a GPU of compute capability 8.0 (Ampere) or later"
        if shape.out_features % N_MULTIPLE or shape.in_features % K_MULTIPLE:
            return (
                f"a layer of {shape.out_features} x {shape.in_features} is no multiple of "
                f"{N_MULTIPLE} x {K_MULTIPLE}"
            )
        return None

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        with failures_as_mismatch("humming"):
            packed = self._pack(weight, device, dtype)
            check_product(self, packed, weight, device, dtype, CHECKED_ROWS)
        return packed

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        from humming.forward import humming_forward

        configuration = self._configurations[shape, x.dtype, x.device]
        with torch.cuda.device_of(x):
            out: Tensor = humming_forward(configuration, x.contiguous(), **packed)
        return out

    def _pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        from humming import dtypes, ops
        from humming.schema import HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        schema = HummingWeightSchema(
            b_dtype=dtypes.DataType.from_str(f"uint{BITS}"),
            bs_dtype=dtypes.DataType.from_torch_dtype(dtype),
            weight_scale_group_size=weight.group_size,
            has_zero_point=True,
        )
        zero = weight.zero.to(device, torch.int32).T.contiguous()
        canonical = {
            "weight": ops.pack_weight(weight.q.to(device, torch.int32).contiguous(), BITS),
            "weight_scale": weight.scale.to(device, dtype).contiguous(),
            "zero_point": ops.pack_weight(zero, BITS).T.contiguous(),
        }
        configuration, packed = prepare_and_transform_humming_tensors(
            canonical, weight.out_features, weight.in_features, schema,
            torch_dtype=dtype, device=device,
        )  # fmt: skip
        self._configurations[Shape.of(weight), dtype, packed["weight"].device] = configuration
        locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        return {**packed, "locks": locks}
