"""Attention over the paged KV cache.

A step's tokens are packed: first the chunks of one token (decodes), then longer chunks of
prompts. An `AttentionBatch` says where each token's keys lie; a backend computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.language.kv_cache import KVCache


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
    block_table: Tensor
    """(blocks,) int64, all blocks from the sequence's beginning to the chunk's end."""
    mask: Tensor | None
    """(rows, context + rows) bool, True where attended; None where plain causal will do."""


@dataclass(frozen=True)
class AttentionBatch:
    """The layout of one step's packed tokens.

    Attributes:
        positions: (tokens,) int64.
        slots: (tokens,) int64, where each token's key and value go.
        num_decodes: the first rows, one token of one sequence each.
        decode_block_tables: (num_decodes, blocks) int64, padded with block 0.
        decode_mask: (num_decodes, 1, 1, blocks * block_size) bool, True where attended.
        prompts: the longer chunks.
    """

    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_block_tables: Tensor
    decode_mask: Tensor
    prompts: tuple[PromptChunk, ...]

    @classmethod
    def build(cls, spans: Sequence[Span], block_size: int, device: torch.device) -> AttentionBatch:
        """From the step's chunks, those of one token first."""
        num_decodes = sum(1 for span in spans if span.end - span.start == 1)
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        slots = torch.cat([_slots(span, block_size) for span in spans])

        decodes = spans[:num_decodes]
        width = max((-(-span.end // block_size) for span in decodes), default=0)
        tables = torch.zeros(num_decodes, width, dtype=torch.long)
        for row, span in enumerate(decodes):
            used = -(-span.end // block_size)
            tables[row, :used] = torch.tensor(span.block_table[:used])
        ends = torch.tensor([span.end for span in decodes], dtype=torch.long)
        mask = torch.arange(width * block_size) < ends.unsqueeze(1)

        prompts, row = [], num_decodes
        for span in spans[num_decodes:]:
            prompts.append(_prompt_chunk(span, row, block_size, device))
            row += span.end - span.start
        return cls(
            positions=positions.to(device),
            slots=slots.to(device),
            num_decodes=num_decodes,
            decode_block_tables=tables.to(device),
            decode_mask=mask[:, None, None, :].to(device),
            prompts=tuple(prompts),
        )


def _slots(span: Span, block_size: int) -> Tensor:
    positions = torch.arange(span.start, span.end)
    blocks = torch.tensor(span.block_table, dtype=torch.long)
    return blocks[positions // block_size] * block_size + positions % block_size


def _prompt_chunk(span: Span, row: int, block_size: int, device: torch.device) -> PromptChunk:
    mask = None
    if span.start > 0:
        queries = torch.arange(span.start, span.end).unsqueeze(1)
        mask = (torch.arange(span.end) <= queries).to(device)
    return PromptChunk(
        first=row,
        last=row + span.end - span.start,
        context=span.start,
        block_table=torch.tensor(span.block_table[: -(-span.end // block_size)]).to(device),
        mask=mask,
    )


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int, batch: AttentionBatch
) -> Tensor:
    """The portable backend: torch's scaled_dot_product_attention over gathered blocks.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim) of the same tokens; also in the cache already.

    Returns:
        (tokens, heads, head_dim).
    """
    out = torch.empty_like(q)
    if batch.num_decodes:
        keys, values = cache.read(layer, batch.decode_block_tables)
        out[: batch.num_decodes] = _sdpa(
            q[: batch.num_decodes, None], keys, values, mask=batch.decode_mask
        )[:, 0]
    for chunk in batch.prompts:
        rows = slice(chunk.first, chunk.last)
        keys, values = k[rows], v[rows]
        if chunk.mask is not None:
            end = chunk.context + chunk.last - chunk.first
            keys, values = (x[:end] for x in cache.read(layer, chunk.block_table))
        out[rows] = _sdpa(q[None, rows], keys[None], values[None], mask=chunk.mask)[0]
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """All (batch, tokens, heads, head_dim); causal where no mask is given."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)
