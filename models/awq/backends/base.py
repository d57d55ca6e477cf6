"""One way to multiply with 4-bit weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from models.awq.quantized_weight import QuantizedWeight

Packed: TypeAlias = dict[str, Tensor]
"""A backend's own buffers for one layer."""


class Shape(NamedTuple):
    """Of one linear layer: N, K and G."""

    out_features: int
    in_features: int
    group_size: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Shape:
        return cls(weight.out_features, weight.in_features, weight.group_size)


class Backend(ABC):
    """Stateless; what belongs to a layer is in its `Packed`."""

    @abstractmethod
    def unsupported(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot do such a layer, or None."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Packed:
        """
        Args:
            dtype: of the activations to come.

        Raises:
            BackendMismatch: the backend's own arithmetic is not what was expected here.
        """

    @abstractmethod
    def matmul(self, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        """x: (M, K) in the dtype and on the device of `pack` -> (M, N), the same."""

    def plans(self, shape: Shape, rows: int, device: torch.device) -> tuple[str, ...]:
        """Ways in which it can multiply so many rows, among which measuring decides. The first is
        the one to take unmeasured."""
        return ("",)

    def run(self, plan: str, x: Tensor, packed: Packed, shape: Shape) -> Tensor:
        """`matmul`, in one of the ways that `plans` named for so many rows."""
        return self.matmul(x, packed, shape)


class BackendMismatch(Exception):
    """A backend found at load that it would compute something else than the weights say."""
