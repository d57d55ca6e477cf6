"""The paged KV cache: the tensors whose blocks `models.engine.block_pool` hands out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one attention head; older configs leave it to be derived."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class KVCacheShape:
    """Everything that fixes how many bytes a block takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PreTrainedConfig, block_size: int, dtype: torch.dtype) -> KVCacheShape:
        return cls(
            config.num_hidden_layers,
            config.num_key_value_heads,
            head_dim(config),
            block_size,
            dtype,
        )

    @property
    def bytes_per_block(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


class KVCache:
    """Keys and values of all layers: `keys[layer]` is (blocks, block_size, kv_heads, head_dim)."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        size = (
            shape.num_layers, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim,
        )  # fmt: skip
        # Zeros, not empty: masked positions still enter products, where a NaN would survive.
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores (tokens, kv_heads, head_dim) at `slots` = block * block_size + offset."""
        self.keys[layer].flatten(0, 1)[slots] = keys
        self.values[layer].flatten(0, 1)[slots] = values

    def read(self, layer: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, (..., blocks * block_size, kv_heads, head_dim)."""
        keys = self.keys[layer][block_tables]
        values = self.values[layer][block_tables]
        return keys.flatten(-4, -3), values.flatten(-4, -3)
