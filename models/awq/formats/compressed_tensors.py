"""compressed-tensors' `pack-quantized`, which llm-compressor writes and vLLM reads.

    w[n, k] = (q[n, k] - zero[n, k // G]) * weight_scale[n, k // G]

Tensors, for N outputs, K inputs and groups of G:
    weight_packed      (N, ceil(K / 8)) int32, eight inputs in sequence
    weight_scale       (N, K / G) float
    weight_shape       (2,) integers: N and K
    weight_zero_point  (ceil(N / 8), K / G) int32, eight outputs in sequence; asymmetric ones only,
                       the zero points of symmetric ones are 8
    weight_g_idx       (K,) integers: the group of each input, where it is stored

Its own documentation counts values and zero points from -8 to 7; they are stored 8 higher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.formats.base import (
    FLOATS,
    AwqFormat,
    TensorHeader,
    check_finite,
    wrong_dtype,
    wrong_shape,
)
from models.awq.formats.groups import allowed_groups, group_size_of
from models.awq.formats.nibbles import PER_WORD, pack_nibbles, unpack_nibbles
from models.awq.quantized_weight import MIDDLE_Q, QuantizedWeight

WHERE = "compressed-tensors"
INTEGERS = (torch.int64, torch.int32)
UNSET = -1
"""In `weight_g_idx`: it was allocated and never filled, so the order is the plain one."""
_ZERO_POINT, _ORDER = "weight_zero_point", "weight_g_idx"


class CompressedTensors(AwqFormat):
    """See the module's documentation."""

    def __init__(self, *, symmetric: bool) -> None:
        self.symmetric = symmetric
        self.suffixes = ("weight_packed", "weight_scale", "weight_shape")
        if not symmetric:
            self.suffixes += (_ZERO_POINT,)
        self.optional = (_ORDER,)

    def matches(self, headers: Mapping[str, TensorHeader]) -> bool:
        return "weight_packed" in headers and (_ZERO_POINT in headers) is not self.symmetric

    def problem(
        self, headers: Mapping[str, TensorHeader], n: int, k: int
    ) -> tuple[str, str] | None:
        words, outputs = -(-k // PER_WORD), -(-n // PER_WORD)
        found = headers["weight_scale"].shape[-1:]
        scales = [(n, groups) for groups in allowed_groups(k, found)]
        problem = (
            wrong_dtype(headers, "weight_packed", (torch.int32,), WHERE)
            or wrong_shape(headers, "weight_packed", (n, words))
            or wrong_dtype(headers, "weight_scale", FLOATS, WHERE)
            or wrong_shape(headers, "weight_scale", *scales)
            or wrong_dtype(headers, "weight_shape", INTEGERS, WHERE)
            or wrong_shape(headers, "weight_shape", (2,))
        )
        if problem is None and not self.symmetric:
            problem = wrong_dtype(headers, _ZERO_POINT, (torch.int32,), WHERE) or wrong_shape(
                headers, _ZERO_POINT, (outputs, *found)
            )
        if problem is None and _ORDER in headers:
            problem = wrong_shape(headers, _ORDER, (k,))
        return problem

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        n, k = (int(size) for size in tensors["weight_shape"])
        if packed.shape != (n, -(-k // PER_WORD)):
            raise ValueError(
                f"weight_shape says {n} x {k}, which weight_packed of shape "
                f"{tuple(packed.shape)} does not hold"
            )
        check_finite(scale, "weight_scale")
        group_size = group_size_of(k, scale.shape[1])
        if _ORDER in tensors:
            _check_order(tensors[_ORDER], group_size)
        if self.symmetric:
            zero = torch.full(scale.shape, MIDDLE_Q, dtype=torch.uint8)
        else:
            zero = unpack_nibbles(tensors[_ZERO_POINT].t()).t()[:n].contiguous()
        return QuantizedWeight(unpack_nibbles(packed)[:, :k].contiguous(), scale, zero, group_size)

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        n, k = weight.q.shape
        tensors = {
            "weight_packed": pack_nibbles(F.pad(weight.q, (0, -k % PER_WORD))),
            "weight_scale": weight.scale.to(dtype).contiguous(),
            "weight_shape": torch.tensor([n, k]),
        }
        if not self.symmetric:
            zero = F.pad(weight.zero.t(), (0, -n % PER_WORD))
            tensors[_ZERO_POINT] = pack_nibbles(zero).t().contiguous()
        elif bool((weight.zero != MIDDLE_Q).any()):
            raise ValueError(
                f"symmetric compressed-tensors has no other zero point than {MIDDLE_Q}; quantise "
                "symmetrically, or write the asymmetric kind"
            )
        return tensors


def _check_order(order: Tensor, group_size: int) -> None:
    plain = torch.arange(order.shape[0]) // group_size
    if not bool((order == UNSET).all()) and not torch.equal(order.to(plain.dtype), plain):
        raise ValueError(
            "weight_g_idx puts neighbouring inputs into different groups (GPTQ's activation "
            'order, actorder "group"), which is not supported; quantise with actorder "static" '
            "or none"
        )
