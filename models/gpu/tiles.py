"""Sizes of the attention kernels' tiles, chosen to compile without spilled registers and within the
99 KiB of shared memory that every GPU from compute capability 8.0 on gives one program."""

from __future__ import annotations

import math

import torch

LOG2_E = math.log2(math.e)
"""Softmax is computed in powers of two, which GPUs have an instruction for."""
SMALLEST = 16
"""Of either side of a product on tensor cores."""
PROGRAMS_PER_MULTIPROCESSOR = 4
"""That splits are made for: what registers and shared memory of the larger GPUs hold at a time."""
MAX_SPLITS = 64
"""A power of two. The kernel that joins them is compiled for these, once."""
MIN_SPLIT = 128
"""Tokens that a split is worth its own program and a place in the second kernel."""


def padded_dim(head_dim: int) -> int:
    """A power of two, for Triton's tiles."""
    return max(SMALLEST, 1 << (head_dim - 1).bit_length())


def tile_size(dim: int, dtype: torch.dtype, num_bytes: int) -> int:
    """Tokens whose keys, of `num_bytes` in all, and values are held at a time.

    Args:
        dim: see `padded_dim`.
    """
    return max(SMALLEST, min(64, num_bytes // (dim * dtype.itemsize)))


def split_count(sequences: int, kv_heads: int, max_tokens: int, multiprocessors: int) -> int:
    """Into how many parts each sequence's keys are cut.

    Args:
        max_tokens: that a table has room for.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, sequences * kv_heads)
    return max(1, min(wanted, max_tokens // MIN_SPLIT, MAX_SPLITS))
