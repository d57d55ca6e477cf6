"""Attention's kernels against its formula in float64, over blocks that lie anywhere in a cache
whose every other place holds NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.gpu.tiles import split_count
from models.language.attention import Span
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.paged_batch import PagedBatch
from tests.unit.gpu.device import DEVICE

GENERATOR = torch.Generator().manual_seed(0)
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of results below 1, and in proportion above: the rounding of weights and of the result."""


def spans_of(chunks: list[tuple[int, int]], block_size: int, blocks: int) -> list[Span]:
    """(start, end) of each sequence, with blocks from anywhere. The table goes on behind the end,
    as that of a sequence whose next blocks are there already."""
    free = torch.randperm(blocks, generator=GENERATOR).tolist()
    return [
        Span(start, end, [free.pop() for _ in range(-(-end // block_size) + 1)])
        for start, end in chunks
    ]


def past(spans: list[Span], shape: KVCacheShape, blocks: int) -> tuple[KVCache, list[Tensor]]:
    """A cache that holds what lies before each span, and NaN; and the whole sequences' keys and
    values, (2, kv_heads, tokens, head_dim) each."""
    cache = KVCache(shape, blocks, DEVICE)
    for vectors in (*cache.keys, *cache.values):
        vectors.fill_(torch.nan)
    sequences = []
    for span in spans:
        both = torch.randn(2, shape.num_kv_heads, span.end, shape.head_dim, generator=GENERATOR)
        both = both.to(shape.dtype)
        for token in range(span.start):
            block, offset = span.block_table[token // shape.block_size], token % shape.block_size
            cache.keys[1][block, :, offset] = both[0, :, token].to(DEVICE)
            cache.values[1][block, :, offset] = both[1, :, token].to(DEVICE)
        sequences.append(both)
    return cache, sequences


def in_float64(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last tokens' queries (rows, heads, head_dim) over (kv_heads, tokens, head_dim)."""
    group = q.shape[1] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    rows, tokens = scores.shape[1:]
    future = torch.arange(tokens) > torch.arange(tokens - rows, tokens).unsqueeze(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def no_rotation(tokens: int, shape: KVCacheShape) -> tuple[Tensor, Tensor]:
    size = (tokens, 1, shape.head_dim)
    one = torch.ones(size, dtype=shape.dtype, device=DEVICE)
    return one, torch.zeros_like(one)


def check(
    chunks: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    splits: int | None = None,
) -> Tensor:
    """Compares a step of the chunks with the formula, and returns its result."""
    shape = KVCacheShape(2, kv_heads, head_dim, block_size, dtype)
    blocks = sum(-(-end // block_size) + 1 for _, end in chunks) + 3
    spans = spans_of(chunks, block_size, blocks)
    cache, sequences = past(spans, shape, blocks)
    batch = PagedBatch.build(spans, shape, DEVICE)
    if splits is not None:
        batch = replace(batch, num_splits=splits)
    q = [torch.randn(e - s, heads, head_dim, generator=GENERATOR).to(dtype) for s, e in chunks]
    new = [x[:, :, span.start :] for x, span in zip(sequences, spans, strict=True)]
    qkv = torch.cat([torch.cat(q), torch.cat([x.flatten(0, 1) for x in new], 1).transpose(0, 1)], 1)
    got = batch.attend(
        qkv.contiguous().to(DEVICE), no_rotation(len(qkv), shape), cache, layer=1
    ).cpu()
    assert got.dtype == dtype and got.shape == (len(qkv), heads, head_dim)
    wanted = torch.cat([in_float64(a, *both) for a, both in zip(q, sequences, strict=True)])
    error = (got.double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < TOLERANCES[dtype]
    assert cache.keys[0].isnan().all(), "the other layer's are its own"
    return got


def decodes(*lengths: int) -> list[tuple[int, int]]:
    return [(length - 1, length) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (7, 1), (8, 1), (18, 1)])
def test_single_queries_of_any_group(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    for splits in (1, 3):
        check(decodes(1, 17, 150), heads=heads, kv_heads=kv_heads, dtype=dtype, splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_single_queries_at_the_edges_of_blocks_and_splits(splits: int) -> None:
    """With more splits than some of them have tiles."""
    check(decodes(1, 15, 16, 17, 64, 65, 500), splits=splits)


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(8, 16), (24, 48), (64, 5), (80, 32), (96, 16), (128, 48)]
)
def test_any_size_of_heads_and_blocks(head_dim: int, block_size: int) -> None:
    check([*decodes(100, 33), (40, 60)], head_dim=head_dim, block_size=block_size, splits=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_chunks_of_prompts(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """At the beginning and behind a context; within one tile and over several."""
    chunks = [(0, 2), (0, 70), (15, 17), (130, 140), (63, 129)]
    check(chunks, heads=heads, kv_heads=kv_heads, dtype=dtype)


def test_decodes_and_chunks_share_a_step() -> None:
    check([*decodes(1, 80, 33), (0, 20), (100, 131)], dtype=torch.float16)


def test_scores_in_the_hundreds_do_no_harm() -> None:
    shape = KVCacheShape(2, 2, 64, 16, torch.float32)
    spans = spans_of([(99, 100), (30, 50)], 16, 14)
    cache, sequences = past(spans, shape, 14)
    q = 60 * torch.randn(21, 2, 64, generator=GENERATOR)
    kv = torch.cat(
        [both[:, :, span.start :] for both, span in zip(sequences, spans, strict=True)], 2
    )
    qkv = torch.cat([q, kv.flatten(0, 1).transpose(0, 1)], 1).to(DEVICE)
    got = PagedBatch.build(spans, shape, DEVICE).attend(qkv, no_rotation(21, shape), cache, 1).cpu()
    wanted = torch.cat([in_float64(q[:1], *sequences[0]), in_float64(q[1:], *sequences[1])])
    assert (got.double() - wanted).abs().max() < 1e-4


def test_a_row_has_the_same_bits_whatever_the_others_hold() -> None:
    shape = KVCacheShape(2, 2, 64, 16, torch.float16)
    spans = spans_of(decodes(150, 90, 1, 300), 16, 60)
    cache, _ = past([Span(span.end, span.end, span.block_table) for span in spans], shape, 60)
    q = torch.randn(4, 8, 64, generator=GENERATOR).half().to(DEVICE)
    results = []
    for others in ([1, 2, 3], [3, 1, 1], [2, 3, 2]):
        batch = PagedBatch.build([spans[0], *(spans[i] for i in others)], shape, DEVICE)
        batch = replace(batch, num_splits=2)
        rotation = no_rotation(4, shape)
        results.append(batch.attend(q[[0, *others]].clone(), rotation, cache, 1)[0].cpu())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("splits", [1, 3])
def test_padding_writes_nothing_and_comes_out_as_zeros(splits: int) -> None:
    shape = KVCacheShape(2, 2, 64, 16, torch.float32)
    batch = replace(PagedBatch.padded(4, 8, shape, DEVICE), num_splits=splits)
    spans = spans_of(decodes(100, 16), 16, 12)
    cache, sequences = past(spans, shape, 12)
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    rotation = no_rotation(4, shape)
    qkv = torch.randn(4, 8, 64, generator=GENERATOR).to(DEVICE)
    assert not batch.attend(qkv.clone(), rotation, cache, 1).any()
    for x, y in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))

    addresses = {name: batch.integers[name].data_ptr() for name in ("slots", "tables", "lengths")}
    batch.load(spans, shape)
    assert {name: batch.integers[name].data_ptr() for name in addresses} == addresses
    got = batch.attend(qkv.clone(), rotation, cache, 1).cpu()
    for row, both in enumerate(sequences):
        both[:, :, -1] = qkv[row, 4:].view(2, 2, 64).cpu()
        wanted = in_float64(qkv[row : row + 1, :4].cpu(), *both)
        assert (got[row].double() - wanted[0]).abs().max() < 2e-6
    assert not got[2:].any(), "two rows are padding"
    batch.load([], shape)
    assert not batch.attend(qkv, rotation, cache, 1).any(), "and all of them again"


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert split_count(1, 32, 4096, 132) == 16
    assert split_count(64, 32, 4096, 132) == 1, "the batch fills it"
    assert split_count(1, 2, 512, 132) == 4, "a table of 512 tokens is not worth more"
    assert split_count(1, 2, 16, 132) == 1
    assert split_count(1, 1, 1 << 20, 132) == 64, "which one program joins"
    assert split_count(0, 8, 0, 132) == 1
