"""The one form of 4-bit weights that every format is read into and every backend packs from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 4
MAX_Q = 2**BITS - 1
MIDDLE_Q = 2 ** (BITS - 1)
"""The zero point of symmetric weights."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight as `(q - zero) * scale`, in groups along the input dimension.

    Attributes:
        q: (N, K) uint8, values 0..15.
        scale: (N, K / G) float, in the file's dtype.
        zero: (N, K / G) uint8, values 0..15.
        group_size: G, inputs that share a scale and a zero point.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int

    def __post_init__(self) -> None:
        n, k = self.q.shape
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"{k} inputs do not divide into groups of {self.group_size}")
        groups = (n, k // self.group_size)
        if self.scale.shape != groups or self.zero.shape != groups:
            raise ValueError(
                f"a weight of {n} x {k} in groups of {self.group_size} has scales and zeros of "
                f"{groups}, not {tuple(self.scale.shape)} and {tuple(self.zero.shape)}"
            )

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    @classmethod
    def cat(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Layers that read the same input, joined along their outputs."""
        if len(weights) == 1:
            return weights[0]
        if len({(weight.in_features, weight.group_size) for weight in weights}) != 1:
            raise ValueError("only weights of the same inputs and group size can be joined")
        return cls(
            torch.cat([weight.q for weight in weights]),
            torch.cat([weight.scale for weight in weights]),
            torch.cat([weight.zero for weight in weights]),
            weights[0].group_size,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(N, K), computed in float32 (or `dtype`, if wider) and rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        difference = self.q.view(*self.scale.shape, self.group_size).to(wide)
        difference -= self.zero.unsqueeze(-1)
        difference *= self.scale.to(wide).unsqueeze(-1)
        return difference.view(self.q.shape).to(dtype)
