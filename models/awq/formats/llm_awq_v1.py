"""llm-awq's first format with outputs first (September 2023 to February 2024); AutoAWQ's GEMV.

    w[n, k] = (q[n, k] - zero[n, k // G]) * scales[n, k // G]

Tensors, for N outputs, K inputs and groups of G:
    qweight  (N, K / 8) int32, eight inputs in sequence
    qzeros   (N, zero_width(K, G)) int32, eight groups in sequence
    scales   (N, 8 * zero_width(K, G)) float; columns beyond K / G are zero
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq.formats.base import AwqFormat, TensorHeader, check_finite, wrong_shape
from models.awq.formats.groups import (
    OCTET,
    PADDED_GROUP_SIZES,
    infer_group_size,
    padded_groups,
    zero_width,
)
from models.awq.formats.int32_layers import SUFFIXES, is_int32_layer, outputs_first, wrong_words
from models.awq.formats.nibbles import pack_nibbles, unpack_nibbles
from models.awq.quantized_weight import QuantizedWeight


class LlmAwqV1(AwqFormat):
    """See the module's documentation."""

    suffixes = SUFFIXES

    def matches(self, headers: Mapping[str, TensorHeader]) -> bool:
        return is_int32_layer(headers) and outputs_first(headers)

    def problem(
        self, headers: Mapping[str, TensorHeader], n: int, k: int
    ) -> tuple[str, str] | None:
        scales = [(n, groups) for groups in padded_groups(k)]
        zeros = (n, *(groups // OCTET for groups in headers["scales"].shape[1:]))
        return (
            wrong_words(headers, n, k, where="llm-awq v1")
            or wrong_shape(headers, "scales", *scales)
            or wrong_shape(headers, "qzeros", zeros, note=" (an eighth of scales)")
        )

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        qweight, qzeros, scales = (tensors[suffix] for suffix in self.suffixes)
        q = unpack_nibbles(qweight)
        group_size = infer_group_size(scales.t(), q.shape[1])
        groups = q.shape[1] // group_size
        scale = scales[:, :groups].contiguous()
        check_finite(scale, "scales")
        return QuantizedWeight(
            q, scale, unpack_nibbles(qzeros)[:, :groups].contiguous(), group_size
        )

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        n, k = weight.q.shape
        if n % OCTET or k % OCTET or weight.group_size not in PADDED_GROUP_SIZES:
            raise ValueError(
                f"llm-awq v1 holds layers whose outputs and inputs are multiples of {OCTET} and "
                f"groups one of {sorted(PADDED_GROUP_SIZES)}, not {n} x {k} in groups of "
                f"{weight.group_size}"
            )
        padding = (0, OCTET * zero_width(k, weight.group_size) - weight.scale.shape[1])
        return {
            "qweight": pack_nibbles(weight.q),
            "qzeros": pack_nibbles(F.pad(weight.zero, padding)),
            "scales": F.pad(weight.scale.to(dtype), padding),
        }
