"""AWQ's formats on disk, told apart by their tensors, never by a file's name."""

from __future__ import annotations

from collections.abc import Mapping

from models.awq.formats.awq_gemm import AwqGemm
from models.awq.formats.base import AwqFormat, TensorHeader
from models.awq.formats.compressed_tensors import CompressedTensors
from models.awq.formats.llm_awq_v1 import LlmAwqV1
from models.awq.formats.llm_awq_v2 import LlmAwqV2
from models.registry import Registry

FORMATS: Registry[AwqFormat] = Registry("AWQ format")
FORMATS.register("llm-awq-v2", LlmAwqV2())
FORMATS.register("llm-awq-v1", LlmAwqV1())
# One format under its two names, which are all that differs: a reader takes the first.
FORMATS.register("autoawq-gemm", AwqGemm())
FORMATS.register("llm-awq-v0", FORMATS["autoawq-gemm"])
FORMATS.register("compressed-tensors", CompressedTensors(symmetric=False))
FORMATS.register("compressed-tensors-symmetric", CompressedTensors(symmetric=True))

QUANTIZED_SUFFIXES = frozenset(
    suffix for entry in FORMATS.values() for suffix in (*entry.suffixes, *entry.optional)
)
"""Every tensor name, after its layer's, that says the layer is quantised."""


def detect(headers: Mapping[str, TensorHeader]) -> str | None:
    """The name of the format of a layer with these tensors; None if it is of none."""
    return next((name for name in FORMATS if FORMATS[name].matches(headers)), None)


__all__ = ["FORMATS", "QUANTIZED_SUFFIXES", "AwqFormat", "TensorHeader", "detect"]
