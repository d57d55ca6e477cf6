"""The precisions a checkpoint is written in, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.awq.formats import FORMATS
from models.awq.quantized_weight import QuantizedWeight
from models.errors import ConfigurationError
from models.registry import Registry


@dataclass(frozen=True)
class OutputFormat:
    """
    Attributes:
        entry: a name in `models.awq.formats.FORMATS`; None for 16 bits.
        file_ending: of the one `.pt` file that holds the quantised model, beside the checkpoint's
            own weights. None for formats that take the place of those weights.
        dtype: of all floating-point tensors, where the format allows one only.
        config: group size -> `quantization_config` of config.json.
    """

    name: str
    entry: str | None = None
    file_ending: str | None = None
    dtype: torch.dtype | None = None
    config: Callable[[int], dict[str, object]] | None = None

    @property
    def is_quantized(self) -> bool:
        return self.entry is not None

    @property
    def symmetric(self) -> bool:
        """Every zero point is 8, so that the weights are others than those of all other formats."""
        return self.entry is not None and FORMATS[self.entry].symmetric

    @property
    def stands_apart(self) -> bool:
        """It takes the place of the 16-bit weights, so that both cannot be in one folder."""
        return self.is_quantized and self.file_ending is None

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert self.entry is not None
        return FORMATS[self.entry].pack(weight, dtype)


def _awq_config(group_size: int) -> dict[str, object]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "mm_projector"],
    }  # fmt: skip


def _compressed_tensors_config(group_size: int, symmetric: bool) -> dict[str, object]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": group_size, "actorder": None, "dynamic": False, "observer": "minmax",
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {**group, "input_activations": None, "output_activations": None}
        },
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*projector.*"],
        "kv_cache_scheme": None,
    }  # fmt: skip


OUTPUT_FORMATS: Registry[OutputFormat] = Registry("format", ConfigurationError)
for _format in (
    OutputFormat("16bit"),
    OutputFormat("llm-awq-v2", "llm-awq-v2", "awq-v2.pt"),
    OutputFormat("llm-awq-v1", "llm-awq-v1", "awq-v1.pt"),
    OutputFormat("llm-awq-v0", "llm-awq-v0", "awq.pt"),
    OutputFormat("autoawq", "autoawq-gemm", dtype=torch.float16, config=_awq_config),
    OutputFormat(
        "compressed-tensors",
        "compressed-tensors",
        config=lambda group_size: _compressed_tensors_config(group_size, symmetric=False),
    ),
    OutputFormat(
        "compressed-tensors-sym",
        "compressed-tensors-symmetric",
        config=lambda group_size: _compressed_tensors_config(group_size, symmetric=True),
    ),
):
    OUTPUT_FORMATS.register(_format.name, _format)
