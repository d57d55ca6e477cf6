"""torch's own 4-bit product for CPUs (`aten::_weight_int4pack_mm_for_cpu`), bf16 activations.

At one row it reads weights near the memory's speed, about four times as fast as 16-bit weights.
Its convention is `(q - 8) * scale + offset`, hence `offset = (8 - zero) * scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.awq.backends.base import Backend, Packed, Shape
from models.awq.quantized_weight import QuantizedWeight

GROUP_SIZES = (32, 64, 128, 256)
BLOCK_ROWS = 64
"""torch packs so many rows together, or a divisor of it, by the processor's kind."""
CHUNK = 2**20
"""Weights that are packed at a time."""


class CpuInt4(Backend):
    """Buffers: weight (N, K / 2) uint8 in torch's order; scale_offset (K / G, N, 2) bf16."""

    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype != torch.bfloat16:
            return f"it runs bfloat16 on the CPU only, not {dtype} on {device.type}"
        if shape.out_features % 16:
            return f"the number of outputs, {shape.out_features}, is not a multiple of 16"
        return group_size_problem(shape)

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        n, k = weight.q.shape
        packed = torch.empty((n, k // 2), dtype=torch.uint8)
        rows = max(BLOCK_ROWS, CHUNK // k // BLOCK_ROWS * BLOCK_ROWS)
        for start in range(0, n, rows):
            # torch takes 32 bits for each value, which a whole layer at once would double its
            # model's memory with.
            part = weight.q[start : start + rows].to(torch.int32)
            packed[start : start + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                part, 1
            )
        return {"weight": packed, "scale_offset": scale_and_offset(weight).to(dtype)}

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), packed["weight"], shape.group_size, packed["scale_offset"]
        )
        return out


def group_size_problem(shape: Shape) -> str | None:
    """torch's int4 products know the same few group sizes on every device."""
    if shape.group_size in GROUP_SIZES:
        return None
    return f"groups of {shape.group_size} are none of {', '.join(map(str, GROUP_SIZES))}"


def scale_and_offset(weight: QuantizedWeight) -> Tensor:
    """(K / G, N, 2) float32 in torch's convention."""
    scale = weight.scale.float()
    offset = (8.0 - weight.zero.float()) * scale
    return torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous()
