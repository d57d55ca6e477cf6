"""Root-mean-square norm, with the residual sum before it, in one pass over each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, PADDED_SIZE)
    inside = at < SIZE
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row + at, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    # Rounded before the weight as well as after it, as transformers' models do.
    normed = wide.to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + at, (weight * normed).to(x.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (rows, size), contiguous -> the same; weight: (size,) of x's dtype."""
    out = torch.empty_like(x)
    _launch(x, None, weight, None, out, eps)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, rounded to their dtype, and its norm; all (rows, size), contiguous."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, delta, weight, total, out, eps)
    return total, out


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float
) -> None:
    rows, size = x.shape
    padded = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rows,)](
            x, x if delta is None else delta, weight, out if total is None else total, out, eps,
            SIZE=size, PADDED_SIZE=padded, ADD=delta is not None,
            num_warps=min(16, max(1, padded // 512)),
        )  # fmt: skip
