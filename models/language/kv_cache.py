"""The paged KV cache: the tensors whose blocks `models.engine.block_pool` hands out."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Of all layers."""
        return self.num_layers * self.layer_bytes_per_block

    @property
    def layer_bytes_per_block(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize * self.block_size

    def slots(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """(tokens,) blocks and positions within them -> (tokens, kv_heads) int64: where each
        token's vectors lie among all vectors of a layer."""
        heads = blocks.unsqueeze(1) * self.num_kv_heads + torch.arange(self.num_kv_heads)
        return heads * self.block_size + offsets.unsqueeze(1)

    def tables(self, blocks: Tensor) -> Tensor:
        """(..., blocks) -> (..., kv_heads, blocks) int64: where each head's part of each block
        lies among all such parts of a layer."""
        heads = torch.arange(self.num_kv_heads).unsqueeze(1)
        return blocks.unsqueeze(-2) * self.num_kv_heads + heads


class KVCache:
    """Keys and values of all layers: `keys[layer]` is (blocks, kv_heads, block_size, head_dim).

    Heads come before positions, so that blocks are gathered into one matrix for each head, which
    products take as it is.
    """

    def __init__(
        self,
        shape: KVCacheShape,
        num_blocks: int,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        """
        Args:
            device: of all layers, or of each.
        """
        self.shape = shape
        self.num_blocks = num_blocks
        devices = [device] * shape.num_layers if isinstance(device, torch.device) else device
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=each) for each in devices]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=each) for each in devices]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores (tokens, kv_heads, head_dim) at `slots`; see `KVCacheShape.slots`."""
        for cached, new in ((self.keys, keys), (self.values, values)):
            cached[layer].flatten(0, 2).index_copy_(0, slots.flatten(), new.flatten(0, 1))

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, (..., kv_heads, blocks * block_size, head_dim).

        Args:
            tables: (..., kv_heads, blocks); see `KVCacheShape.tables`.
        """
        rows, size = tables.flatten(), (*tables.shape[:-1], -1, self.shape.head_dim)
        # Several times as fast as indexing with a tensor.
        keys = self.keys[layer].flatten(0, 1).index_select(0, rows)
        values = self.values[layer].flatten(0, 1).index_select(0, rows)
        return keys.view(size), values.view(size)
