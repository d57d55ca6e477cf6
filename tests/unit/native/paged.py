"""Paged caches for the kernels' tests, and attention's formula over them in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.language.attention import AttentionBatch, Span
from models.language.kv_cache import KVCache, KVCacheShape

CPU = torch.device("cpu")


def spans_of(chunks: Sequence[tuple[int, int]], block_size: int) -> list[Span]:
    """(start, end) of each sequence's chunk -> spans whose blocks lie anywhere."""
    sizes = [-(-end // block_size) for _, end in chunks]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    tables = order.split(sizes)
    return [Span(*chunk, table.tolist()) for chunk, table in zip(chunks, tables, strict=True)]


def cache_of(
    spans: Sequence[Span], kv_heads: int, head_dim: int, block_size: int = 16, layers: int = 1
) -> KVCache:
    """Random where the spans' tokens are, NaN everywhere else."""
    shape = KVCacheShape(layers, kv_heads, head_dim, block_size, torch.bfloat16)
    cache = KVCache(shape, sum(len(span.block_table) for span in spans) + 2, CPU)
    generator = torch.Generator().manual_seed(0)
    for vectors in (*cache.keys, *cache.values):
        vectors.fill_(torch.nan)
        for span in spans:
            for at, block in enumerate(span.block_table):
                used = vectors[block, :, : span.end - at * block_size]
                used.normal_(generator=generator)
    return cache


def attention(q: Tensor, cache: KVCache, layer: int, spans: Sequence[Span]) -> Tensor:
    """Ours. q: (tokens, heads, head_dim), the spans' tokens in their order, whose keys and values
    are the cache's."""
    batch = AttentionBatch.build(spans, cache.shape, CPU)
    own = (vectors[layer].flatten(0, 2)[batch.slots] for vectors in (cache.keys, cache.values))
    ones = q.new_ones(q.shape[0], 1, q.shape[2])
    return batch.attend(torch.cat((q, *own), dim=1), (ones, torch.zeros_like(ones)), cache, layer)


def in_float64(q: Tensor, cache: KVCache, layer: int, spans: Sequence[Span]) -> Tensor:
    """Softmax of scaled products over all tokens up to each query's own."""
    results = []
    group = q.shape[1] // cache.shape.num_kv_heads
    queries = q.double().split([span.end - span.start for span in spans])
    for own, span in zip(queries, spans, strict=True):
        keys, values = (
            torch.cat([vectors[layer][block] for block in span.block_table], dim=1)[:, : span.end]
            .double()
            .repeat_interleave(group, dim=0)
            for vectors in (cache.keys, cache.values)
        )
        scores = own.transpose(0, 1) @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        later = torch.arange(span.end) > torch.arange(span.start, span.end).unsqueeze(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        results.append((weights @ values).transpose(0, 1))
    return torch.cat(results)
