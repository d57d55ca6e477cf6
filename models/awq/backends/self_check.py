"""A product held against the canonical weights, so that no layout has to be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from models.awq.backends.base import Backend, BackendMismatch, Packed, Shape
from models.awq.quantized_weight import QuantizedWeight

LARGEST_ERROR = 0.02
"""Relative to the product's largest value. bf16 rounds by 0.004; a wrong order of nibbles is off
by the product's own size."""


@contextmanager
def failures_as_mismatch(package: str) -> Iterator[None]:
    """What another's package raises, whatever it is, only means that another backend is wanted.

    Raises:
        BackendMismatch: in place of it. Lack of memory stays what it is.
    """
    try:
        yield
    except (BackendMismatch, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BackendMismatch(f"{package}: {type(error).__name__}: {error}") from error


def check_product(
    backend: Backend,
    packed: Packed,
    weight: QuantizedWeight,
    device: torch.device,
    dtype: torch.dtype,
    rows: Iterable[int],
) -> None:
    """Multiplies random activations, once for each number of `rows`.

    Raises:
        BackendMismatch: the weights as they are packed compute something else than they say.
    """
    shape = Shape.of(weight)
    on_device = QuantizedWeight(
        weight.q.to(device), weight.scale.to(device), weight.zero.to(device), weight.group_size
    )
    wide = on_device.dequantize(dtype)
    generator = torch.Generator().manual_seed(0)
    for count in rows:
        x = torch.randn(count, shape.in_features, generator=generator).to(device, dtype)
        expected = F.linear(x, wide).float()
        error = (backend.matmul(x, packed, shape).float() - expected).abs().max()
        if not bool(error <= LARGEST_ERROR * expected.abs().max()):  # a NaN is none either
            raise BackendMismatch(
                f"its product of {count} row(s) disagrees with the dequantised weights"
            )
