"""llm-awq's first format and AutoAWQ's GEMM give their tensors the same names and dtypes.

    llm-awq v1     qweight (N, K / 8), qzeros (N, Z / 8), scales (N, Z); Z is K / G, padded
    AutoAWQ GEMM   qweight (K, N / 8), qzeros (K / G, N / 8), scales (K / G, N)

So shapes tell them apart, also where N = K: the outputs come first in all three tensors or in
none, and the rows of GEMM's scales are fewer than those of its weights, since G is more than one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.awq.formats.base import (
    FLOATS,
    TensorHeader,
    impossible_layer,
    wrong_dtype,
    wrong_shape,
)
from models.awq.formats.nibbles import PER_WORD

SUFFIXES = ("qweight", "qzeros", "scales")


def is_int32_layer(headers: Mapping[str, TensorHeader]) -> bool:
    """Whether it is one of the two. What has a `g_idx` is GPTQ's, whatever else it shares."""
    qweight = headers.get("qweight")
    if not headers.keys().isdisjoint({"scaled_zeros", "g_idx"}):
        return False
    return "qzeros" in headers or (qweight is not None and qweight.dtype == torch.int32)


def outputs_first(headers: Mapping[str, TensorHeader]) -> bool:
    """Whether it is llm-awq v1. Either of the small tensors will do; one may be damaged."""
    qweight = headers.get("qweight")
    return qweight is not None and any(
        headers[suffix].shape[:1] == qweight.shape[:1]
        for suffix in ("qzeros", "scales")
        if suffix in headers
    )


def wrong_words(
    headers: Mapping[str, TensorHeader], n: int, k: int, *, where: str
) -> tuple[str, str] | None:
    """What `AwqFormat.problem` says of `qweight`, and of the others' dtypes."""
    first = outputs_first(headers)
    if (k if first else n) % PER_WORD:
        return impossible_layer("qweight", n, k)
    shapes = (n, k // PER_WORD), (k, n // PER_WORD)
    own, other = shapes if first else shapes[::-1]
    whose = "AutoAWQ GEMM and llm-awq v0" if first else "llm-awq v1"
    return (
        wrong_dtype(headers, "qweight", (torch.int32,), where)
        or wrong_shape(headers, "qweight", own, note=f" ({whose}: {other})")
        or wrong_dtype(headers, "qzeros", (torch.int32,), where)
        or wrong_dtype(headers, "scales", FLOATS, where)
    )
