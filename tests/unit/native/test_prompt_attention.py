"""Attention of prompts' chunks over the paged cache against its formula in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.language import attention as module
from models.native import kernels
from tests.unit.native.paged import attention, cache_of, in_float64, spans_of

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)

TOLERANCE = 0.03
"""Weights are rounded to bf16 (2^-9 of each, before values of some units), and so are results."""
CHUNKS = [(0, 2), (0, 17), (1, 3), (14, 18), (16, 48), (47, 64), (63, 130), (128, 256), (300, 337)]


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1), (20, 1)])
def test_chunks_over_scattered_blocks(head_dim: int, heads: int, kv_heads: int) -> None:
    for block_size in (16, 32):
        spans = spans_of(CHUNKS, block_size)
        cache = cache_of(spans, kv_heads, head_dim, block_size)
        tokens = sum(span.end - span.start for span in spans)
        q = torch.randn(tokens, heads, head_dim).bfloat16()
        got, wanted = attention(q, cache, 0, spans), in_float64(q, cache, 0, spans)
        assert (got.double() - wanted).abs().max() < TOLERANCE
        assert (got.double() - wanted).norm() < 3e-3 * wanted.norm()


def test_large_scores_do_no_harm() -> None:
    spans = spans_of([(70, 90)], 16)
    cache = cache_of(spans, 2, 64)
    q = 50 * torch.randn(20, 4, 64).bfloat16()  # scores in the hundreds
    got, wanted = attention(q, cache, 0, spans), in_float64(q, cache, 0, spans)
    assert (got.double() - wanted).abs().max() < TOLERANCE


def test_a_row_has_the_same_bits_in_other_chunks_beside_others_and_with_two_threads() -> None:
    """So an answer does not depend on what the prefix cache knew."""
    beside = [(5, 40), (0, 90)]
    whole, *others = spans_of([(0, 200), *beside], 16)
    cache = cache_of([whole, *others], 2, 128)
    q = torch.randn(200, 6, 128).bfloat16()
    alone = attention(q, cache, 0, [whole])
    torch.set_num_threads(2)
    for cuts in ((0, 200), (0, 16, 200), (0, 97, 131, 200)):
        for start, end in pairwise(cuts):
            spans = [others[0], whole._replace(start=start, end=end), others[1]]
            rows = torch.cat((q[:35], q[start:end], q[:90]))
            got = attention(rows, cache, 0, spans)[35 : 35 + end - start]
            assert torch.equal(got, alone[start:end])


def test_it_is_the_kernel_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("torch's product was asked")

    monkeypatch.setattr(module, "_sdpa", refuse)
    spans = spans_of([(0, 20), (30, 50)], 16)
    attention(torch.randn(40, 4, 64).bfloat16(), cache_of(spans, 2, 64), 0, spans)


def test_what_the_kernel_cannot_do_torch_does() -> None:
    """Other head sizes, other block sizes; single queries as well."""
    for head_dim, block_size in ((32, 16), (80, 16), (64, 8)):
        spans = spans_of([(29, 30), (4, 5), (3, 12), (20, 40)], block_size)
        cache = cache_of(spans, 2, head_dim, block_size)
        q = torch.randn(31, 4, head_dim).bfloat16()
        wanted = in_float64(q, cache, 0, spans)
        assert (attention(q, cache, 0, spans).double() - wanted).abs().max() < TOLERANCE
