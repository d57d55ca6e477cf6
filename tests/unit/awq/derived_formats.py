"""Every other format, derived anew from its formula, one number at a time.

Written from reference/checkpoints.md and from nothing in `models`, as `derived.py` is:

    llm-awq v1          qweight[n, k/8] nibble k%8; qzeros[n, g/8] nibble g%8; scales[n, 8*zw]
    v0, AutoAWQ GEMM    nibble i of word c holds column 8c + [0,2,4,6,1,3,5,7][i]
    compressed-tensors  weight_packed[n, k/8] nibble k%8; weight_zero_point[n/8, g] nibble n%8
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.unit.awq.derived import Layer, scale_rows
from tests.unit.awq.derived import write as write_v2

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Words:
    """int32 words, into which nibbles are put one by one."""

    def __init__(self, *shape: int) -> None:
        self.words = np.zeros(shape, dtype=np.uint32)

    def put(self, row: int, column: int, nibble: int, value: int) -> None:
        self.words[row, column] |= np.uint32(int(value) << (4 * nibble))

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.words.view(np.int32))


def write_v1(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    n, k = layer.q.shape
    width = scale_rows(k, layer.group)
    qweight, qzeros = Words(n, k // 8), Words(n, width // 8)
    scales = torch.zeros(n, width, dtype=dtype)
    for row in range(n):
        for column in range(k):
            qweight.put(row, column // 8, column % 8, layer.q[row, column])
        for group in range(k // layer.group):
            qzeros.put(row, group // 8, group % 8, layer.zero[row, group])
            scales[row, group] = float(layer.scale[row, group])
    return {"qweight": qweight.tensor(), "qzeros": qzeros.tensor(), "scales": scales}


def write_gemm(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    n, k = layer.q.shape
    groups = k // layer.group
    qweight, qzeros = Words(k, n // 8), Words(groups, n // 8)
    scales = torch.zeros(groups, n, dtype=dtype)
    for word in range(n // 8):
        for nibble, place in enumerate(AWQ_ORDER):
            output = 8 * word + place
            for row in range(k):
                qweight.put(row, word, nibble, layer.q[output, row])
            for group in range(groups):
                qzeros.put(group, word, nibble, layer.zero[output, group])
                scales[group, output] = float(layer.scale[output, group])
    return {"qweight": qweight.tensor(), "qzeros": qzeros.tensor(), "scales": scales}


def write_symmetric(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values of -8..7, stored 8 higher."""
    n, k = layer.q.shape
    packed = Words(n, -(-k // 8))
    for row in range(n):
        for column in range(k):
            value = int(layer.q[row, column]) - 8
            packed.put(row, column // 8, column % 8, value + 8)
    return {
        "weight_packed": packed.tensor(),
        "weight_scale": torch.from_numpy(layer.scale).to(dtype),
        "weight_shape": torch.tensor([n, k]),
    }


def write_asymmetric(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    n, k = layer.q.shape
    zeros = Words(-(-n // 8), k // layer.group)
    for row in range(n):
        for group in range(k // layer.group):
            zeros.put(row // 8, group, row % 8, layer.zero[row, group])
    return {**write_symmetric(layer, dtype), "weight_zero_point": zeros.tensor()}


WRITERS: dict[str, Callable[[Layer, torch.dtype], dict[str, Tensor]]] = {
    "llm-awq-v2": write_v2,
    "llm-awq-v1": write_v1,
    "llm-awq-v0": write_gemm,
    "autoawq-gemm": write_gemm,
    "compressed-tensors": write_asymmetric,
    "compressed-tensors-symmetric": write_symmetric,
}
