"""llm-awq's second format, derived anew from its formula, one number at a time.

Written from reference/checkpoints.md and from nothing in `models`, so that the two can disagree:

    w[n,k] = q[n,k] * scales[k//G, n] + scaled_zeros[k//G, n]
    row = n//4 ; col = 64*(k//64) + 16*(n%4) + 8*((k//32)%2) + (k%8) ; shift = 4*((k//8)%4)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Layer(NamedTuple):
    """A quantised layer as plain arrays: q (N, K), scale and zero (N, K / G)."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: int

    def weight(self) -> np.ndarray:
        """(N, K) float64."""
        n, k = self.q.shape
        out = np.empty((n, k))
        for column in range(k):
            g = column // self.group
            zero = self.zero[:, g].astype(np.float64)
            out[:, column] = (self.q[:, column] - zero) * self.scale[:, g].astype(np.float64)
        return out


def random_layer(n: int, k: int, group: int, seed: int = 0) -> Layer:
    """Every nibble and every zero point occurs; scales are exact in fp16 and in bf16."""
    rng = np.random.default_rng(seed)
    scale = rng.integers(128, 256, (n, k // group)) / 2.0**13
    return Layer(
        rng.integers(0, 16, (n, k), dtype=np.uint8), scale,
        rng.integers(0, 16, (n, k // group), dtype=np.uint8), group,
    )  # fmt: skip


def scale_rows(k: int, group: int) -> int:
    """8 * zw(K, G): how many rows `scales` has, padding included."""
    width = -(-(k // group) // 8)
    multiple = {32: 4, 64: 2, 128: 1}[group]
    return 8 * (-(-width // multiple) * multiple)


def write(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    n, k = layer.q.shape
    words = np.zeros((n // 4, k), dtype=np.uint16)
    for row in range(n):
        for column in range(k):
            at = 64 * (column // 64) + 16 * (row % 4) + 8 * ((column // 32) % 2) + column % 8
            shift = 4 * ((column // 8) % 4)
            words[row // 4, at] |= np.uint16(int(layer.q[row, column]) << shift)
    scales = torch.zeros(scale_rows(k, layer.group), n, dtype=dtype)
    scaled_zeros = torch.zeros_like(scales)
    for g in range(k // layer.group):
        scale = torch.from_numpy(layer.scale[:, g].copy()).to(dtype)
        scales[g] = scale
        scaled_zeros[g] = -(scale.double() * torch.from_numpy(layer.zero[:, g].copy())).to(dtype)
    return {
        "qweight": torch.from_numpy(words.view(np.int16)),
        "scales": scales,
        "scaled_zeros": scaled_zeros,
    }


def read(tensors: dict[str, Tensor], group: int) -> np.ndarray:
    """The dequantised weight (N, K) float64, by the formula on the stored tensors."""
    q, scales, zeros = _stored(tensors, group)
    return q * scales + zeros


def read_exactly(tensors: dict[str, Tensor], group: int) -> np.ndarray:
    """The same with `scaled_zeros`' rounding undone: (q - zero) * scale, zeros being whole."""
    q, scales, zeros = _stored(tensors, group)
    return (q - np.rint(-zeros / scales)) * scales


def _stored(tensors: dict[str, Tensor], group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, scales and scaled_zeros, each (N, K) float64."""
    words = tensors["qweight"].numpy().view(np.uint16).astype(np.int64)
    n, k = np.ogrid[: words.shape[0] * 4, : words.shape[1]]
    at = 64 * (k // 64) + 16 * (n % 4) + 8 * ((k // 32) % 2) + k % 8
    q = (words[n // 4, at] >> (4 * ((k // 8) % 4))) & 15
    scales, zeros = (tensors[name].double().numpy() for name in ("scales", "scaled_zeros"))
    return q.astype(np.float64), scales[k // group, n], zeros[k // group, n]
