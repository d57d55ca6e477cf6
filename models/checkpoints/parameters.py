"""A module's parameter from a checkpoint's tensors, never in memory twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.checkpoints.weight_source import WeightSource


def load_parameter(
    module: nn.Module,
    name: str,
    parts: Sequence[str],
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """
    Args:
        module: on `meta`, with the parameter's shape.
        name: "model.layers.0.mlp.gate_up_proj.weight".
        parts: the tensors in `source` that the parameter consists of, one below the other.
    """
    value = torch.empty(module.get_parameter(name).shape, dtype=dtype, device=device)
    rows = value.split([source.shape(part)[0] for part in parts])
    for part, out in zip(parts, rows, strict=True):
        source.copy_into(part, out)
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Parameter(value, requires_grad=False))
