"""Attention of single queries over the paged cache against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from models.native import kernels
from tests.unit.native.paged import attention, cache_of, in_float64, spans_of

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(
    ("lengths", "block_size"), [([1], 16), ([15, 16, 17], 16), ([33, 200, 2], 16), ([70, 31], 32)]
)
def test_single_queries_over_scattered_blocks(
    head_dim: int, heads: int, kv_heads: int, lengths: list[int], block_size: int
) -> None:
    spans = spans_of([(length - 1, length) for length in lengths], block_size)
    cache = cache_of(spans, kv_heads, head_dim, block_size, layers=2)
    q = torch.randn(len(lengths), heads, head_dim).bfloat16()
    for layer in (0, 1):
        got, wanted = attention(q, cache, layer, spans), in_float64(q, cache, layer, spans)
        # The result's own rounding, and fp32's.
        assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_large_scores_do_no_harm() -> None:
    spans = spans_of([(19, 20)], 16)
    cache = cache_of(spans, 2, 64)
    q = 50 * torch.randn(1, 2, 64).bfloat16()  # scores in the hundreds
    got, wanted = attention(q, cache, 0, spans), in_float64(q, cache, 0, spans)
    assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_a_sequence_has_the_same_bits_beside_others_and_with_two_threads() -> None:
    spans = spans_of([(99, 100), (6, 7), (249, 250)], 16)
    cache = cache_of(spans, 2, 128)
    q = torch.randn(3, 4, 128).bfloat16()
    alone = torch.cat([attention(q[i : i + 1], cache, 0, spans[i : i + 1]) for i in range(3)])
    torch.set_num_threads(2)
    assert torch.equal(attention(q, cache, 0, spans), alone)
