"""SwiGLU on the packed output of the fused gate and up projections."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)  # rounded, as torch's is
    tl.store(
        out_ptr + row * SIZE + at,
        (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype),
        mask=inside,
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """(rows, 2 * size), contiguous, the gates first -> (rows, size): silu(gate) * up."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    with torch.cuda.device_of(gate_up):
        swiglu_kernel[(rows, triton.cdiv(size, BLOCK))](gate_up, out, SIZE=size, BLOCK=BLOCK)
    return out
