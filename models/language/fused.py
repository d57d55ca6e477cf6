"""What a layer computes between its products: by one kernel each on a GPU and on a CPU that has
ours, by torch elsewhere.

All round at the same places, where transformers' models do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpu.support import runs_triton
from models.native import Kernels, kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (tokens, size) -> the same; weight: (size,) of x's dtype."""
    if runs_triton(x.device):
        from models.gpu import norm

        return norm.rms_norm(x, weight, eps)
    library = _kernels_for(x)
    if library is not None:
        return library.rms_norm(x.contiguous(), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm; all (tokens, size). x may be overwritten."""
    if runs_triton(x.device):
        from models.gpu import norm

        return norm.add_rms_norm(x, delta, weight, eps)
    library = _kernels_for(x)
    if library is not None:
        x = x.contiguous()
        return x, library.rms_norm(x, weight, eps, delta.contiguous())
    x = x + delta
    return x, rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(tokens, 2 * size), the gates first -> (tokens, size): silu(gate) * up."""
    if runs_triton(gate_up.device):
        from models.gpu import activation

        return activation.swiglu(gate_up)
    library = _kernels_for(gate_up)
    if library is not None:
        return library.swiglu(gate_up.contiguous())
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _kernels_for(x: Tensor) -> Kernels | None:
    return kernels() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else None
