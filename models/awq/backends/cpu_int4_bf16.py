"""4-bit weights for few rows, and a bfloat16 copy of them for many.

torch's 4-bit product computes some 160 GFLOP/s on a core with AVX-512, which a few rows do not
need, since reading the weights takes longer; its bfloat16 product computes 390. So prompts go
through the copy, up to 2.5 times as fast, for five times the memory. From MANY_ROWS rows on the
copy was faster for all layers of models from 1B to 7B (`benchmarks/cpu_linears.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.backends.base import Packed, Shape
from models.awq.backends.cpu_int4 import CpuInt4
from models.awq.quantized_weight import QuantizedWeight

MANY_ROWS = 12


class CpuInt4Bf16(CpuInt4):
    """Buffers: CpuInt4's, and copy (N, K) bf16."""

    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        return {**super().pack(weight, device, dtype), "copy": weight.dequantize(dtype)}

    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        if x.shape[0] < MANY_ROWS:
            return super().matmul(x, packed, shape)
        return F.linear(x, packed["copy"])
