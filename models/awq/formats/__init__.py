"""AWQ's formats on disk, told apart by their tensors, never by a file's name."""

from __future__ import annotations

from models.awq.formats.base import AwqFormat, TensorHeader
from models.awq.formats.llm_awq_v2 import LlmAwqV2
from models.registry import Registry

FORMATS: Registry[AwqFormat] = Registry("AWQ format")
FORMATS.register("llm-awq v2", LlmAwqV2())

QUANTIZED_SUFFIXES = frozenset(suffix for entry in FORMATS.values() for suffix in entry.suffixes)
"""Every tensor name, after its layer's, that says the layer is quantised."""

__all__ = ["FORMATS", "QUANTIZED_SUFFIXES", "AwqFormat", "TensorHeader"]
