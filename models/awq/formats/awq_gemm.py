"""AutoAWQ's GEMM, the default of its safetensors; and llm-awq's format before it (v0, May to
August 2023), which is the same in `.pt` files.

    w[n, k] = (q[n, k] - zero[n, k // G]) * scales[k // G, n]

Tensors, for N outputs, K inputs and groups of G:
    qweight  (K, N / 8) int32; of eight outputs, 0 2 4 6 1 3 5 7 from the lowest bits up
    qzeros   (K / G, N / 8) int32, in the same order
    scales   (K / G, N) float
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.awq.formats.base import AwqFormat, TensorHeader, check_finite, wrong_shape
from models.awq.formats.groups import allowed_groups, group_size_of
from models.awq.formats.int32_layers import SUFFIXES, is_int32_layer, outputs_first, wrong_words
from models.awq.formats.nibbles import (
    PER_WORD,
    deinterleave,
    interleave,
    pack_nibbles,
    unpack_nibbles,
)
from models.awq.quantized_weight import QuantizedWeight


class AwqGemm(AwqFormat):
    """See the module's documentation."""

    suffixes = SUFFIXES

    def matches(self, headers: Mapping[str, TensorHeader]) -> bool:
        return is_int32_layer(headers) and not outputs_first(headers)

    def problem(
        self, headers: Mapping[str, TensorHeader], n: int, k: int
    ) -> tuple[str, str] | None:
        found = headers["scales"].shape[:1]
        scales = [(groups, n) for groups in allowed_groups(k, found)]
        zeros = (*found, n // PER_WORD)
        return (
            wrong_words(headers, n, k, where="AutoAWQ GEMM")
            or wrong_shape(headers, "scales", *scales)
            or wrong_shape(headers, "qzeros", zeros, note=" (an eighth of scales)")
        )

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        qweight, qzeros, scales = (tensors[suffix] for suffix in self.suffixes)
        check_finite(scales, "scales")
        group_size = group_size_of(qweight.shape[0], scales.shape[0])
        q, zero = (deinterleave(unpack_nibbles(words)) for words in (qweight, qzeros))
        return QuantizedWeight(
            q.t().contiguous(), scales.t().contiguous(), zero.t().contiguous(), group_size
        )

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        n, k = weight.q.shape
        if n % PER_WORD:
            raise ValueError(
                f"AutoAWQ GEMM holds layers whose outputs are a multiple of {PER_WORD}, not "
                f"{n} x {k}"
            )
        return {
            "qweight": pack_nibbles(interleave(weight.q.t())),
            "qzeros": pack_nibbles(interleave(weight.zero.t())),
            "scales": weight.scale.to(dtype).t().contiguous(),
        }
