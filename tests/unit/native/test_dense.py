"""The dense product against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from models.native import kernels

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 32), (7, 64), (64, 100), (129, 1000), (5, 31), (300, 2080)]
)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9, 33])
def test_the_dense_product_is_fp32s(n: int, k: int, rows: int) -> None:
    library = kernels()
    assert library is not None
    x, weight = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()
    wanted = x.double() @ weight.double().T
    got = library.dense_matmul(x, weight)
    assert got.dtype == torch.float32 and got.shape == (rows, n)
    assert torch.allclose(got.double(), wanted, atol=1e-5 * k**0.5, rtol=1e-5)
    torch.set_num_threads(2)
    assert torch.equal(library.dense_matmul(x, weight), got)
    for row in range(rows):
        assert torch.equal(library.dense_matmul(x[row : row + 1], weight)[0], got[row])
