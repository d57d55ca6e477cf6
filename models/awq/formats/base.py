"""What a format of quantised linear layers on disk has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.awq.quantized_weight import QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that scales may have."""


class TensorHeader(NamedTuple):
    """What is known of a tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class AwqFormat(ABC):
    """One format. Tensors are keyed by their suffix: "qweight" for "<layer>.qweight".

    Attributes:
        suffixes: the tensors that every layer of this format has, bias apart.
        optional: those that a layer may have besides.
        symmetric: whether every zero point is 8, and `pack` takes no other.
    """

    suffixes: tuple[str, ...]
    optional: tuple[str, ...] = ()
    symmetric: bool = False

    @abstractmethod
    def matches(self, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether a layer with these tensors is of this format."""

    @abstractmethod
    def problem(
        self, headers: Mapping[str, TensorHeader], n: int, k: int
    ) -> tuple[str, str] | None:
        """(suffix, what is wrong with it) for a layer of N outputs and K inputs, or None."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """
        Args:
            tensors: all of `suffixes`, and those of `optional` that are there.

        Raises:
            ValueError: the values cannot be of this format.
        """

    @abstractmethod
    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """
        Args:
            dtype: of the scales.

        Returns:
            A layer's tensors, as files of this format hold them.

        Raises:
            ValueError: the format has no place for such a shape, or for such zero points.
        """


def wrong_dtype(
    headers: Mapping[str, TensorHeader], suffix: str, allowed: tuple[torch.dtype, ...], where: str
) -> tuple[str, str] | None:
    """An answer of `AwqFormat.problem`; `where` is what messages call the format."""
    dtype = headers[suffix].dtype
    if dtype in allowed:
        return None
    expected = " or ".join(map(str, allowed))
    return suffix, f"has dtype {dtype}, where {where} has {expected}"


def wrong_shape(
    headers: Mapping[str, TensorHeader], suffix: str, *allowed: tuple[int, ...], note: str = ""
) -> tuple[str, str] | None:
    """An answer of `AwqFormat.problem`; `note` follows the expected shapes."""
    shape = headers[suffix].shape
    if shape in allowed:
        return None
    expected = " or ".join(map(str, allowed)) or "another number of inputs"
    return suffix, f"has shape {shape}, expected {expected}{note}"


def impossible_layer(suffix: str, n: int, k: int) -> tuple[str, str]:
    """An answer of `AwqFormat.problem` where no shape of the tensor would do."""
    return suffix, f"cannot hold a layer of {n} x {k}, which the config asks for"


def check_finite(scales: Tensor, suffix: str) -> None:
    """
    Raises:
        ValueError: a scale is infinite or not a number.
    """
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{suffix} hold values that are not finite, so the tensor is damaged")
