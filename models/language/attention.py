"""Attention over the paged KV cache, by torch and by the CPU's own kernels.

A step's tokens are packed: first the chunks of one token (decodes), then longer chunks of
prompts. An `AttentionBatch` says where each token's keys lie. `models.language.attention_backends`
names the other ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.language.kv_cache import KVCache, KVCacheShape
from models.language.rope import rotate
from models.native import Kernels, kernels
from models.native.library import BLOCK_MULTIPLE, HEAD_DIMS


class Span(NamedTuple):
    """A chunk of one sequence: tokens `start` to `end` of it, whose blocks are `block_table`."""

    start: int
    end: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class PromptChunk:
    """A chunk of several tokens: rows `first` to `last` of the packed batch."""

    first: int
    last: int
    context: int
    """How many tokens of the sequence were computed in earlier steps."""
    tables: Tensor
    """(kv_heads, blocks) int64, all blocks from the sequence's beginning to the chunk's end."""

    @cached_property
    def mask(self) -> Tensor | None:
        """(rows, context + rows) bool, True where attended; None where plain causal will do. Made
        for torch's product when it first asks; our own kernel needs none."""
        if self.context == 0:
            return None
        device, end = self.tables.device, self.context + self.last - self.first
        queries = torch.arange(self.context, end, device=device).unsqueeze(1)
        return torch.arange(end, device=device) <= queries

    def to(self, device: torch.device) -> PromptChunk:
        return replace(self, tables=self.tables.to(device))


@dataclass(frozen=True)
class AttentionBatch:
    """The layout of one step's packed tokens. Slots and tables are `KVCacheShape`'s.

    Attributes:
        positions: (tokens,) int64.
        slots: (tokens, kv_heads) int64, where each token's keys and values go.
        num_decodes: the first rows, one token of one sequence each.
        decode_tables: (num_decodes, kv_heads, blocks) int64, padded with block 0.
        decode_mask: (num_decodes, 1, 1, blocks * block_size) bool, True where attended.
        prompts: the longer chunks.
    """

    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_tables: Tensor
    decode_mask: Tensor
    prompts: tuple[PromptChunk, ...]

    @classmethod
    def build(
        cls, spans: Sequence[Span], shape: KVCacheShape, device: torch.device
    ) -> AttentionBatch:
        """From the step's chunks, those of one token first."""
        size = shape.block_size
        num_decodes = sum(1 for span in spans if span.end - span.start == 1)
        decodes, longer = spans[:num_decodes], spans[num_decodes:]
        ends = torch.tensor([span.end for span in decodes], dtype=torch.long)
        positions = [ends - 1, *(torch.arange(span.start, span.end) for span in longer)]
        last = torch.tensor([s.block_table[s.start // size] for s in decodes], dtype=torch.long)
        blocks = [last, *(_blocks_of_tokens(span, size) for span in longer)]
        all_positions = torch.cat(positions)

        width = max((-(-span.end // size) for span in decodes), default=0)
        tables = torch.zeros((num_decodes, width), dtype=torch.long)
        rows = tables.numpy()
        for row, span in enumerate(decodes):
            used = -(-span.end // size)
            rows[row, :used] = span.block_table[:used]
        mask = torch.arange(width * size) < ends.unsqueeze(1)

        prompts, row = [], num_decodes
        for span in longer:
            prompts.append(_prompt_chunk(span, row, shape, device))
            row += span.end - span.start
        return cls(
            positions=all_positions.to(device),
            slots=shape.slots(torch.cat(blocks), all_positions % size).to(device),
            num_decodes=num_decodes,
            decode_tables=shape.tables(tables).to(device),
            decode_mask=mask[:, None, None, :].to(device),
            prompts=tuple(prompts),
        )

    def to(self, device: torch.device) -> AttentionBatch:
        """The same layout, for layers on another device."""
        return replace(
            self,
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            decode_tables=self.decode_tables.to(device),
            decode_mask=self.decode_mask.to(device),
            prompts=tuple(chunk.to(device) for chunk in self.prompts),
        )

    def attend(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int
    ) -> Tensor:
        """See `StepLayout.attend`."""
        library = _kernels_for(cache.shape, qkv.device)
        if library is not None:
            return _attend_in_place(library, qkv, rotation, cache, layer, self)
        kv_heads = cache.shape.num_kv_heads
        qk, v = qkv.tensor_split([qkv.shape[1] - kv_heads], dim=1)
        q, k = rotate(qk, *rotation).tensor_split([qk.shape[1] - kv_heads], dim=1)
        cache.write(layer, self.slots, k, v)
        return attend(q, k, v, cache, layer, self)


def _blocks_of_tokens(span: Span, block_size: int) -> Tensor:
    blocks = torch.tensor(span.block_table, dtype=torch.long)
    return blocks[torch.arange(span.start, span.end) // block_size]


def _prompt_chunk(span: Span, row: int, shape: KVCacheShape, device: torch.device) -> PromptChunk:
    blocks = torch.tensor(span.block_table[: -(-span.end // shape.block_size)])
    return PromptChunk(
        first=row,
        last=row + span.end - span.start,
        context=span.start,
        tables=shape.tables(blocks).to(device),
    )


def _attend_in_place(
    library: Kernels,
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: KVCache,
    layer: int,
    batch: AttentionBatch,
) -> Tensor:
    """`AttentionBatch.attend` by the CPU's own kernels, which read the cache where it lies."""
    keys, values = cache.keys[layer], cache.values[layer]
    q = library.rotate_and_store(qkv, *rotation, batch.slots, keys, values)
    out = q.new_empty(q.shape)
    if batch.num_decodes:
        decodes = slice(batch.num_decodes)
        library.paged_attention(
            q[decodes], keys, values, batch.decode_tables, batch.positions[decodes], out[decodes]
        )
    for chunk in batch.prompts:
        rows = slice(chunk.first, chunk.last)
        library.prompt_attention(q[rows], keys, values, chunk.tables, chunk.context, out[rows])
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int, batch: AttentionBatch
) -> Tensor:
    """By torch's products over gathered blocks.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim) of the same tokens; also in the cache already.

    Returns:
        (tokens, heads, head_dim).
    """
    out = torch.empty_like(q)
    if batch.num_decodes:
        _decode(q[: batch.num_decodes], cache, layer, batch, out[: batch.num_decodes])
    for chunk in batch.prompts:
        rows = slice(chunk.first, chunk.last)
        keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        if chunk.mask is not None:
            end = chunk.context + chunk.last - chunk.first
            keys, values = (x[:, :end] for x in cache.read(layer, chunk.tables))
        out[rows] = _sdpa(q[rows].transpose(0, 1)[None], keys[None], values[None], chunk.mask)[
            0
        ].transpose(0, 1)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """All (batch, heads, tokens, head_dim); causal where no mask is given."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def _decode(q: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, out: Tensor) -> None:
    """One query of each sequence, (sequences, heads, head_dim)."""
    keys, values = cache.read(layer, batch.decode_tables)
    # What lies behind a sequence is another's, perhaps not even numbers, and 0 times that is none.
    elsewhere = ~batch.decode_mask.transpose(-1, -2)
    keys.masked_fill_(elsewhere, 0)
    values.masked_fill_(elsewhere, 0)
    if q.device.type == "cpu":
        out.copy_(_two_products(q, keys, values, batch.decode_mask))
    else:
        out.copy_(_sdpa(q.unsqueeze(2), keys, values, batch.decode_mask).squeeze(2))


def _kernels_for(shape: KVCacheShape, device: torch.device) -> Kernels | None:
    if (
        device.type != "cpu"
        or shape.dtype != torch.bfloat16
        or shape.head_dim not in HEAD_DIMS
        or shape.block_size % BLOCK_MULTIPLE
    ):
        return None
    return kernels()


def _two_products(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of single queries with the scores in float32, as torch's fused kernel for CPUs has
    them. That one takes 4 to 15 times as long for single queries in bfloat16.

    Args:
        q: (sequences, heads, head_dim).
        keys, values: (sequences, kv_heads, tokens, head_dim).
        mask: (sequences, 1, 1, tokens).
    """
    grouped = q.unflatten(1, (keys.shape[1], -1)).float() * q.shape[-1] ** -0.5
    scores = grouped @ keys.float().transpose(-1, -2)
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(-1)
    return (weights.to(values.dtype) @ values).flatten(1, 2)
