"""Eight 4-bit values in an int32, as llm-awq, AutoAWQ and compressed-tensors pack them.

All of them put the first value of a word into its lowest four bits; they differ in which of eight
neighbours comes first. Bytes are worked on rather than words, which torch does several times as
fast (every platform that torch supports is little-endian).
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8


def pack_nibbles(values: Tensor) -> Tensor:
    """(..., 8 W) uint8 of 0..15 -> (..., W) int32, in sequence."""
    pairs = values.unflatten(-1, (-1, 2))
    return _row_major(pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def unpack_nibbles(words: Tensor) -> Tensor:
    """(..., W) int32 -> (..., 8 W) uint8, in sequence."""
    octets = _row_major(words).view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def interleave(values: Tensor) -> Tensor:
    """(..., 8 W): AWQ's order of each eight neighbours, 0 2 4 6 1 3 5 7."""
    return values.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)


def deinterleave(values: Tensor) -> Tensor:
    """(..., 8 W): `interleave` undone."""
    return values.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)


def _row_major(values: Tensor) -> Tensor:
    """With row-major strides also where a dimension of one makes others count as contiguous."""
    if values.stride() == torch.empty(values.shape, device="meta").stride():
        return values
    return values.clone(memory_format=torch.contiguous_format)
