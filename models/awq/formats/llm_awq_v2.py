"""llm-awq's second format, the one of every released VILA-1.5 checkpoint (`*-v2.pt`).

    w[n, k] = q[n, k] * scales[k // G, n] + scaled_zeros[k // G, n]

Tensors, for N outputs, K inputs and groups of G:
    qweight       (N / 4, K) int16; four rows and four octets of columns interleaved, see `pack`
    scales        (8 * zero_width(K, G), N) float; rows beyond K / G are zero
    scaled_zeros  the same shape; -(scale * zero)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.awq.formats.base import (
    FLOATS,
    AwqFormat,
    TensorHeader,
    impossible_layer,
    wrong_dtype,
    wrong_shape,
)
from models.awq.formats.groups import (
    OCTET,
    PADDED_GROUP_SIZES,
    infer_group_size,
    padded_groups,
    zero_width,
)
from models.awq.quantized_weight import MAX_Q, QuantizedWeight

ROWS = 4
"""Output rows that are interleaved in one row of `qweight`."""
STRIDE = 64
"""Inputs in one block of the interleaving."""
LARGEST_ROUNDING = 0.25
"""Of a zero point recomputed from its product. Half a step would be a guess; see `unpack`."""


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """
    Args:
        weight: N a multiple of 8, K of 64, groups of 32, 64, 128 or 256.
        dtype: of scales and scaled zeros: the model's.

    Returns:
        "qweight", "scales" and "scaled_zeros".

    Raises:
        ValueError: the format has no place for such a shape.
    """
    n, k = weight.q.shape
    if n % 8 or k % STRIDE or weight.group_size not in PADDED_GROUP_SIZES:
        raise ValueError(
            f"llm-awq v2 holds layers whose outputs are a multiple of 8, inputs a multiple of "
            f"{STRIDE} and groups one of {sorted(PADDED_GROUP_SIZES)}, not {n} x {k} in groups of "
            f"{weight.group_size}"
        )
    # group of rows, row, block of columns, half, nibble, octet
    q = weight.q.view(n // ROWS, ROWS, k // STRIDE, 2, 4, OCTET).to(torch.int32)
    words = q[..., 0, :] | q[..., 1, :] << 4 | q[..., 2, :] << 8 | q[..., 3, :] << 12
    qweight = words.to(torch.int16).transpose(1, 2).reshape(n // ROWS, k)
    scale = weight.scale.to(dtype)
    product = -(scale.float() * weight.zero).to(dtype)
    rows = OCTET * zero_width(k, weight.group_size)
    return {
        "qweight": qweight.contiguous(),
        "scales": _padded_transpose(scale, rows),
        "scaled_zeros": _padded_transpose(product, rows),
    }


def unpack(
    qweight: Tensor,
    scales: Tensor,
    scaled_zeros: Tensor,
    group_size: int,
    in_features: int,
) -> QuantizedWeight:
    """The canonical form. Zero points are exact; the stored product's rounding is undone.

    Raises:
        ValueError: the shapes do not fit together, or a zero point is not one of 0..15.
    """
    n, k = qweight.shape[0] * ROWS, in_features
    if qweight.shape[1] != k or scales.shape != (OCTET * zero_width(k, group_size), n):
        raise ValueError(
            f"qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} are not a layer of "
            f"{k} inputs in groups of {group_size}"
        )
    # Bytes rather than words: torch works through them several times as fast. The low byte comes
    # first (every platform that torch supports is little-endian).
    octets = qweight.contiguous().view(torch.uint8).view(n // ROWS, k // STRIDE, ROWS, 2, OCTET, 2)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1)
    # row group, block, row, half, octet, byte, nibble -> row group, row, block, half, byte, ...
    q = nibbles.permute(0, 2, 1, 3, 5, 6, 4).reshape(n, k)
    groups = k // group_size
    scale = scales[:groups].t().contiguous()
    product = scaled_zeros[:groups].t().float()
    empty = (scale == 0) & (product == 0)
    ratio = torch.where(empty, torch.zeros(()), -product / scale.float())
    zero = torch.round(ratio)
    in_range = (zero >= 0) & (zero <= MAX_Q) & ((ratio - zero).abs() <= LARGEST_ROUNDING)
    if not bool(in_range.all()):
        raise ValueError(
            "scaled_zeros are not the scales times whole zero points of 0..15, so the tensors "
            "are damaged or of another format"
        )
    return QuantizedWeight(q, scale, zero.to(torch.uint8), group_size)


def _padded_transpose(values: Tensor, rows: int) -> Tensor:
    out = values.new_zeros((rows, values.shape[0]))
    out[: values.shape[1]] = values.t()
    return out


class LlmAwqV2(AwqFormat):
    """See the module's documentation."""

    suffixes = ("qweight", "scales", "scaled_zeros")

    def matches(self, headers: Mapping[str, TensorHeader]) -> bool:
        """Either sign is enough: what is missing or of the wrong dtype is then named as such."""
        qweight = headers.get("qweight")
        return "scaled_zeros" in headers or (qweight is not None and qweight.dtype == torch.int16)

    def problem(
        self, headers: Mapping[str, TensorHeader], n: int, k: int
    ) -> tuple[str, str] | None:
        if n % ROWS or k % STRIDE:
            return impossible_layer("qweight", n, k)
        scales = [(groups, n) for groups in padded_groups(k)]
        return (
            wrong_dtype(headers, "qweight", (torch.int16,), "llm-awq v2")
            or wrong_shape(headers, "qweight", (n // ROWS, k))
            or wrong_dtype(headers, "scales", FLOATS, "llm-awq v2")
            or wrong_shape(headers, "scales", *scales)
            or wrong_dtype(headers, "scaled_zeros", FLOATS, "llm-awq v2")
            or wrong_shape(headers, "scaled_zeros", headers["scales"].shape, note=" (as scales)")
        )

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        qweight, scales, scaled_zeros = (tensors[suffix] for suffix in self.suffixes)
        group_size = infer_group_size(scales, qweight.shape[1])
        return unpack(qweight, scales, scaled_zeros, group_size, qweight.shape[1])

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        return pack(weight, dtype)
