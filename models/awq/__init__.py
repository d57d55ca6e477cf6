"""4-bit weights: the canonical form, the formats on disk, the linear layer and its backends."""

from __future__ import annotations

from models.awq.backends import select_backend
from models.awq.linear import W4A16Linear
from models.awq.quantize import quantize_rtn
from models.awq.quantized_weight import QuantizedWeight
from models.awq.warm_up import backends_of, warm_up_linears

__all__ = [
    "QuantizedWeight",
    "W4A16Linear",
    "backends_of",
    "quantize_rtn",
    "select_backend",
    "warm_up_linears",
]
