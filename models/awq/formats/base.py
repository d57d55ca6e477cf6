"""What a format of quantised linear layers on disk has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.awq.quantized_weight import QuantizedWeight


class TensorHeader(NamedTuple):
    """What is known of a tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class AwqFormat(ABC):
    """One format. Tensors are keyed by their suffix: "qweight" for "<layer>.qweight".

    Attributes:
        suffixes: the tensors that every layer of this format has, bias apart.
    """

    suffixes: tuple[str, ...]

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
        Raises:
            ValueError: the values cannot be of this format.
        """
