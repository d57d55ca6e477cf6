"""Random weights, each drawn from its own name, so that order and format change nothing.

They are drawn as bytes, which takes a fraction of the time of normal numbers. Every value fits
into bfloat16, so that it is the same in each dtype that a checkpoint is written in.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
from torch import Tensor

from models.awq.quantized_weight import QuantizedWeight

BYTE_STD = 73.9
"""Standard deviation of uniform bytes."""
NIBBLE_STD = 4.61
"""Standard deviation of uniform nibbles."""
CHUNK = 1 << 24
"""Values that are held in float32 at a time."""
ZEROS = (6, 10)
"""Zero points lie in this range, the upper end excluded: around the middle, like real ones."""
SYMMETRIC_ZERO = 8
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
"""The number of a layer in a tensor's name."""


class RandomWeights:
    def __init__(self, seed: int, group_size: int, symmetric: bool = False) -> None:
        """
        Args:
            group_size: of the 4-bit layers.
            symmetric: all their zero points are 8.
        """
        self._seed = seed
        self._group_size = group_size
        self._symmetric = symmetric

    def dense(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        """Uniform values of that mean and spread, in bfloat16."""
        rng = self._rng(name)
        out = torch.empty(shape, dtype=torch.bfloat16)
        flat = out.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            part.copy_((_bytes(rng, part.numel()).float() - 127.5) * (std / BYTE_STD) + mean)
        return out

    def quantized(self, name: str, n: int, k: int) -> QuantizedWeight:
        """(N, K) with a spread that keeps the activations' size; scales in bfloat16."""
        rng = self._rng(name)
        pairs = _bytes(rng, n * k // 2)
        q = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(n, k)
        groups = (n, k // self._group_size)
        jitter = torch.from_numpy(rng.uniform(0.8, 1.2, groups))
        scale = (jitter / (NIBBLE_STD * k**0.5)).to(torch.bfloat16)
        if self._symmetric:
            zero = torch.full(groups, SYMMETRIC_ZERO, dtype=torch.uint8)
        else:
            zero = torch.from_numpy(rng.integers(*ZEROS, groups, dtype=np.uint8))
        return QuantizedWeight(q, scale, zero, self._group_size)

    def sizes_only(self) -> RandomWeights:
        """The same, without values: on the meta device."""
        return _Sizes(0, self._group_size, self._symmetric)

    def _rng(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


class EqualLayers(RandomWeights):
    """All layers of a stack hold the first one's weights, so that each is drawn once."""

    def __init__(self, seed: int, group_size: int, symmetric: bool = False) -> None:
        super().__init__(seed, group_size, symmetric)
        self._dense: dict[str, Tensor] = {}
        self._quantized: dict[str, QuantizedWeight] = {}

    def dense(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        first = LAYER.sub("0", name)
        if LAYER.search(name) is None:  # large, and asked for once
            return super().dense(name, shape, std, mean)
        if first not in self._dense:
            self._dense[first] = super().dense(first, shape, std, mean)
        return self._dense[first]

    def quantized(self, name: str, n: int, k: int) -> QuantizedWeight:
        first = LAYER.sub("0", name)
        if first not in self._quantized:
            self._quantized[first] = super().quantized(first, n, k)
        return self._quantized[first]


class _Sizes(RandomWeights):
    def dense(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def quantized(self, name: str, n: int, k: int) -> QuantizedWeight:
        groups = (n, k // self._group_size)
        return QuantizedWeight(
            torch.empty((n, k), dtype=torch.uint8, device="meta"),
            torch.empty(groups, dtype=torch.bfloat16, device="meta"),
            torch.empty(groups, dtype=torch.uint8, device="meta"),
            self._group_size,
        )


def _bytes(rng: np.random.Generator, count: int) -> Tensor:
    return torch.frombuffer(bytearray(rng.bytes(count)), dtype=torch.uint8)
