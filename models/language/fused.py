"""What a layer computes between its products: by one kernel each on a GPU, by torch elsewhere.

Both round at the same places, where transformers' models do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpu.support import runs_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (tokens, size) -> the same; weight: (size,) of x's dtype."""
    if runs_triton(x.device):
        from models.gpu import norm

        return norm.rms_norm(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm; all (tokens, size)."""
    if runs_triton(x.device):
        from models.gpu import norm

        return norm.add_rms_norm(x, delta, weight, eps)
    x = x + delta
    return x, rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(tokens, 2 * size), the gates first -> (tokens, size): silu(gate) * up."""
    if runs_triton(gate_up.device):
        from models.gpu import activation

        return activation.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
