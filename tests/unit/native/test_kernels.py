"""Paged attention and the dense product against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.language.attention import AttentionBatch, Span, attend
from models.language.kv_cache import KVCache, KVCacheShape
from models.native import kernels

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)


def filled_cache(kv_heads: int, head_dim: int, block_size: int, blocks: int) -> KVCache:
    shape = KVCacheShape(2, kv_heads, head_dim, block_size, torch.bfloat16)
    cache = KVCache(shape, blocks, CPU)
    generator = torch.Generator().manual_seed(0)
    for vectors in (*cache.keys, *cache.values):
        vectors.normal_(generator=generator)
    return cache


def scattered(lengths: list[int], block_size: int, blocks: int) -> list[Span]:
    """The last token of each sequence, its blocks anywhere."""
    free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Span(length - 1, length, [free.pop() for _ in range(-(-length // block_size))])
        for length in lengths
    ]


def in_float64(q: Tensor, cache: KVCache, layer: int, spans: list[Span]) -> Tensor:
    """Softmax of scaled products, one sequence after another, block by block."""
    results = []
    group = q.shape[1] // cache.shape.num_kv_heads
    for query, span in zip(q.double(), spans, strict=True):
        blocks = list(span.block_table)
        keys, values = (
            torch.cat([c[layer][b] for b in blocks], dim=1)[:, : span.end].double()
            for c in (cache.keys, cache.values)
        )
        keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
        scores = (keys @ query.unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5
        results.append((scores.softmax(-1).unsqueeze(1) @ values).squeeze(1))
    return torch.stack(results)


def decode(q: Tensor, cache: KVCache, layer: int, spans: list[Span]) -> Tensor:
    unused = q[:, : cache.shape.num_kv_heads]  # keys and values of the step lie in the cache
    return attend(q, unused, unused, cache, layer, AttentionBatch.build(spans, cache.shape, CPU))


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(
    ("lengths", "block_size"), [([1], 16), ([15, 16, 17], 16), ([33, 200, 2], 16), ([70, 31], 32)]
)
def test_single_queries_over_scattered_blocks(
    head_dim: int, heads: int, kv_heads: int, lengths: list[int], block_size: int
) -> None:
    cache = filled_cache(kv_heads, head_dim, block_size, 40)
    spans = scattered(lengths, block_size, 40)
    # As in a layer: the queries are part of a wider tensor.
    wide = torch.randn(len(lengths), heads + kv_heads, head_dim).bfloat16()
    q = wide[:, :heads]
    for layer in (0, 1):
        got, wanted = decode(q, cache, layer, spans), in_float64(q, cache, layer, spans)
        # The result's own rounding, and fp32's.
        assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_large_scores_and_stale_values_beyond_the_end_do_no_harm() -> None:
    cache = filled_cache(2, 64, 16, 4)
    spans = scattered([20], 16, 4)
    q = 50 * torch.randn(1, 2, 64).bfloat16()  # scores in the hundreds
    wanted = in_float64(q, cache, 0, spans)
    last = spans[0].block_table[1]
    cache.keys[0][last, :, 4:], cache.values[0][last, :, 4:] = torch.inf, torch.nan
    got = decode(q, cache, 0, spans)
    assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_a_sequence_has_the_same_bits_beside_others_and_with_two_threads() -> None:
    cache = filled_cache(2, 128, 16, 40)
    spans = scattered([100, 7, 250], 16, 40)
    q = torch.randn(3, 4, 128).bfloat16()
    alone = torch.cat([decode(q[i : i + 1], cache, 1, spans[i : i + 1]) for i in range(3)])
    torch.set_num_threads(2)
    assert torch.equal(decode(q, cache, 1, spans), alone)


def test_what_the_kernel_cannot_do_torch_does() -> None:
    """Other head sizes, other block sizes."""
    for head_dim, block_size in ((32, 16), (80, 16), (64, 8)):
        cache = filled_cache(2, head_dim, block_size, 12)
        spans = scattered([30, 5], block_size, 12)
        q = torch.randn(2, 4, head_dim).bfloat16()
        wanted = in_float64(q, cache, 0, spans)
        assert (decode(q, cache, 0, spans).double() - wanted).abs().max() < 0.02


@pytest.mark.parametrize(("n", "k"), [(1, 32), (7, 64), (64, 100), (129, 1000), (5, 31)])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
def test_the_dense_product_is_fp32s(n: int, k: int, rows: int) -> None:
    library = kernels()
    assert library is not None
    x, weight = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()
    wanted = x.double() @ weight.double().T
    got = library.dense_matmul(x, weight)
    assert got.dtype == torch.float32 and got.shape == (rows, n)
    assert torch.allclose(got.double(), wanted, atol=1e-5 * k**0.5, rtol=1e-5)
    for row in range(rows):
        assert torch.equal(library.dense_matmul(x[row : row + 1], weight)[0], got[row])
