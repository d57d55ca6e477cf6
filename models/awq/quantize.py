"""Round-to-nearest: the last step of AWQ's search, and a quantiser of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from models.awq.quantized_weight import MAX_Q, MIDDLE_Q, QuantizedWeight

SMALLEST_RANGE = 1e-5


def quantize_rtn(
    weight: Tensor, group_size: int = 128, *, symmetric: bool = False
) -> QuantizedWeight:
    """4-bit rounding to nearest, per group of inputs.

    The range of a group is widened to hold zero, because a zero point of 0..15 can represent no
    other; for groups of both signs, which is nearly every one, that is llm-awq's own formula.

    Args:
        weight: (N, K), floating point; its dtype becomes the scales'.
        group_size: K must be a multiple of it.
        symmetric: every zero point is 8, and the range as wide below it as above, by
            compressed-tensors' formula.

    Raises:
        ValueError: K is not a multiple of `group_size`, or a weight is not finite.
    """
    n, k = weight.shape
    if k % group_size:
        raise ValueError(f"{k} inputs do not divide into groups of {group_size}")
    if not torch.isfinite(weight).all():
        raise ValueError("a weight that is not finite cannot be quantised")
    grouped = weight.detach().float().view(n, k // group_size, group_size)
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low).clamp(min=SMALLEST_RANGE) / MAX_Q).to(weight.dtype)
    # Rounding the scale comes first, so that q is the nearest for the scale that is stored.
    step = scale.float()
    zero = torch.full_like(step, MIDDLE_Q) if symmetric else -torch.round(low / step)
    zero = zero.clamp(0, MAX_Q)
    q = torch.round(grouped / step.unsqueeze(-1)) + zero.unsqueeze(-1)
    return QuantizedWeight(
        q.clamp(0, MAX_Q).to(torch.uint8).view(n, k),
        scale,
        zero.to(torch.uint8),
        group_size,
    )
