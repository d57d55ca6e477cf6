"""Dequantise and multiply: runs anywhere, in any dtype; what the other backends are held against.

Weights stay at four bits in memory and are widened per call, so that a model which fits a GPU
in 4 bits also fits with this backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.quantized_weight import QuantizedWeight

ROWS_MULTIPLE = 16
"""CPU matrix products take other paths, with other rounding, for a few left-over rows. Measured
in fp32: padding to whole blocks gives a row the same bits alone and in any batch."""


class Reference(Backend):
    """Buffers: nibbles (N, K / 2) uint8, even k in the low one; scale, zero (N, K / G)."""

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        return (
            "it packs inputs in pairs, and their number is odd" if shape.in_features % 2 else None
        )

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        q = weight.q.to(device)
        return {
            "nibbles": q[:, 0::2] | q[:, 1::2] << 4,
            "scale": weight.scale.contiguous().to(device),
            "zero": weight.zero.contiguous().to(device),
        }

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        weight = dequantize_nibbles(packed, shape, x.dtype)
        rows = x.shape[0]
        if x.device.type == "cpu" and rows % ROWS_MULTIPLE:
            return F.linear(F.pad(x, (0, 0, 0, -rows % ROWS_MULTIPLE)), weight)[:rows]
        return F.linear(x, weight)


def dequantize_nibbles(packed: Packed, shape: Shape, dtype: torch.dtype) -> Tensor:
    """(N, K) in `dtype`. The product is rounded once: fp16 scales are widened for bf16."""
    nibbles, scale = packed["nibbles"], packed["scale"]
    wide = torch.promote_types(scale.dtype, dtype)
    q = torch.stack((nibbles & 15, nibbles >> 4), dim=-1)
    difference = q.view(*scale.shape, shape.group_size).to(wide) - packed["zero"].unsqueeze(-1)
    weight = difference * scale.to(wide).unsqueeze(-1)
    return weight.view(shape.out_features, shape.in_features).to(dtype)
