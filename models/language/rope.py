"""Rotary position embeddings, by transformers' initialisers, tabulated once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.errors import CheckpointError
from models.language.kv_cache import head_dim


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their position (Su et al., 2021; "rotate half" pairing)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: PreTrainedConfig, max_positions: int, device: torch.device) -> None:
        """
        Args:
            config: its `rope_parameters` say theta and scaling.
            max_positions: length of the table.
        """
        super().__init__()
        inv_freq, scaling = _inverse_frequencies(config)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.float())
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", (angles.cos() * scaling).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * scaling).to(device), persistent=False)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for each token, (tokens, 1, head_dim); the same for all layers of a step."""
        return (
            self.cos.index_select(0, positions).to(dtype).unsqueeze(1),
            self.sin.index_select(0, positions).to(dtype).unsqueeze(1),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (tokens, heads, head_dim) -> the same, rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _inverse_frequencies(config: PreTrainedConfig) -> tuple[Tensor, float]:
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise CheckpointError(f"rope_type {kind!r} in config.json is unknown; known are {known}")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq, float(scaling)
