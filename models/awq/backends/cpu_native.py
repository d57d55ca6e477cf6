"""Our own 4-bit product for CPUs with AVX-512 and bf16 dot products (`models/native/w4a16.cpp`).

At one row it reads the weights as fast as the memory gives them, and for many rows it computes at
95 % of what the instruction set can, so that prompts need no 16-bit copy. No weight is rounded to
16 bits, and a row has the same bits alone and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.quantized_weight import QuantizedWeight
from models.native import Kernels, kernels

GROUP_MULTIPLE = 32


class CpuNative(Backend):
    """Buffers: weight, uint8, in the kernel's own order, scales and zero points among it."""

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype != torch.bfloat16:
            return f"it runs bfloat16 on the CPU only, not {dtype} on {device.type}"
        if shape.group_size % GROUP_MULTIPLE:
            return f"groups of {shape.group_size} are no multiple of {GROUP_MULTIPLE}"
        return None if kernels() else "its library is not there; the log says why"

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        scale, multiplier = _in_the_middle_of_fp16(weight.scale)
        packed = _library().w4a16_pack(
            weight.q.contiguous(), scale.contiguous(), weight.zero.contiguous(), multiplier
        )
        return {"weight": packed}

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        return _library().w4a16_matmul(x.contiguous(), packed["weight"], shape.out_features)


def _library() -> Kernels:
    library = kernels()
    assert library is not None, "asked of `unsupported` before"
    return library


def _in_the_middle_of_fp16(scale: Tensor) -> tuple[Tensor, float]:
    """(fp16, m), m a power of two and `fp16 * m` the scales.

    So fp16 scales stay what they are, bf16 ones too down to 2^-28 of the largest, and fp32 ones
    are rounded by 2^-12 at most.
    """
    _, exponent = torch.frexp(scale.float().abs().max())
    multiplier = 2.0 ** max(int(exponent) - 15, -126)  # the largest comes to lie below 2^15
    return (scale.float() / multiplier).half(), multiplier
