"""The W4A16 kernels in Triton's interpreter. Run by `test_w4a16.py` in a process of its own, since
triton decides when a kernel is defined whether it will be interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.awq import quantize_rtn
from models.awq.backends.base import BackendMismatch, Shape
from models.awq.backends.cuda_triton import CudaTriton
from models.gpu import w4a16
from models.gpu.w4a16 import Plan

F16, BF16 = DTYPES = (torch.float16, torch.bfloat16)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""The interpreter cuts float32 off to bfloat16, where a GPU rounds."""
SCALES = (*DTYPES, torch.float32)


class Layer:
    """Random weights, packed, and what they are in float64."""

    def __init__(
        self, n: int, k: int, group: int, scales: torch.dtype = torch.float16, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        zero = torch.randint(0, 16, (n, k // group), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(n, k // group, generator=generator) + 0.1).mul(0.02).to(scales)
        self.k, self.group = k, group
        self.weights = w4a16.pack(q, scale, zero, group)
        spread = {"repeats": group, "dim": 1}
        difference = q.double() - zero.double().repeat_interleave(**spread)
        self.exact = difference * scale.double().repeat_interleave(**spread)

    def matmul(self, x: Tensor, plan: Plan) -> Tensor:
        return w4a16.matmul(x, self.weights, self.k, self.group, plan)


def inputs(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_exact_but_for_rounding(layer: Layer, x: Tensor, plan: Plan) -> None:
    """Of the result, to its dtype, and of float32 sums."""
    got = layer.matmul(x, plan)
    assert got.dtype == x.dtype and got.shape == (x.shape[0], layer.exact.shape[0])
    exact = x.double() @ layer.exact.T
    summed = x.double().abs() @ layer.exact.abs().T
    allowed = EPSILON[x.dtype] * exact.abs() + 2.0**-18 * summed + 1e-7
    assert ((got.double() - exact).abs() <= allowed).all()
    assert not layer.weights.counts.any(), "the next product would count on from there"


@pytest.mark.parametrize(("n", "k", "group", "split", "dtype"), [
    (24, 128, 128, 1, F16), (9, 1280, 128, 1, BF16), (8, 96, 32, 1, BF16), (5, 192, 64, 1, F16),
    (16, 256, 16, 1, F16), (7, 320, 320, 1, F16), (9, 200, 200, 1, BF16), (12, 512, 256, 1, F16),
    (6, 2176, 128, 2, F16), (5, 2176, 32, 4, BF16), (9, 96, 32, 2, F16),
])  # fmt: skip
def test_one_row(n: int, k: int, group: int, split: int, dtype: torch.dtype) -> None:
    plan = Plan("gemv", 1, 4, split, warps=1)
    assert_exact_but_for_rounding(Layer(n, k, group), inputs(1, k, dtype), plan)


@pytest.mark.parametrize(
    "plan",
    [
        Plan("gemv", 1, 2, 1, 4),
        Plan("gemv", 1, 16, 2, 1),
        Plan("gemv", 1, 8, 1, 1, 2),
        Plan("gemv", 1, 4, 2, 1, 2),
    ],
)
def test_one_row_in_other_blocks(plan: Plan) -> None:
    assert_exact_but_for_rounding(Layer(21, 2560, 128), inputs(1, 2560, F16), plan)


@pytest.mark.parametrize("magnitude", [2.0**-20, 1.0, 2.0**30])
def test_one_row_of_any_magnitude(magnitude: float) -> None:
    """Nibbles are multiplied as denormal numbers, and inputs scaled up in exchange."""
    layer, x = Layer(8, 256, 128), inputs(1, 256, torch.bfloat16) * magnitude
    exact = x.double() @ layer.exact.T
    got = layer.matmul(x, Plan("gemv", 1, 8, 1, 1)).double()
    assert (got - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize(("rows", "n", "k", "group", "split", "dtype"), [
    (2, 40, 256, 128, 1, F16), (3, 16, 128, 32, 1, BF16), (5, 70, 384, 64, 2, F16),
    (16, 64, 256, 256, 1, BF16), (17, 33, 96, 32, 1, F16), (1, 20, 128, 128, 1, BF16),
    (33, 48, 640, 128, 2, BF16), (16, 16, 200, 200, 2, F16), (7, 32, 128, 16, 2, F16),
])  # fmt: skip
def test_some_rows(rows: int, n: int, k: int, group: int, split: int, dtype: torch.dtype) -> None:
    plan = Plan("gemm", 16, 32, split, warps=4, stages=2)
    assert_exact_but_for_rounding(Layer(n, k, group), inputs(rows, k, dtype), plan)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("plan", [Plan("gemv", 1, 8, 1, 1), Plan("gemm", 16, 16, 1), Plan("dense")])
def test_scales_of_every_dtype(plan: Plan, scales: torch.dtype) -> None:
    layer = Layer(16, 256, 64, scales)
    x = inputs(1, 256, torch.float16)
    if plan.kernel != "dense":
        assert_exact_but_for_rounding(layer, x, plan)
    else:
        exact = x.double() @ layer.exact.T
        assert (layer.matmul(x, plan).double() - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), [
    (9, 1280, 128), (8, 96, 32), (5, 192, 64), (9, 200, 200), (3, 128, 16),
])  # fmt: skip
def test_dequantised_weights_are_rounded_once(
    n: int, k: int, group: int, dtype: torch.dtype
) -> None:
    layer = Layer(n, k, group)
    got = w4a16.dequantize(layer.weights, k, group, dtype)
    if dtype == torch.float16:
        # The product of a four-bit number and a 16-bit scale has no more bits than float32.
        assert torch.equal(got, layer.exact.to(dtype))
    assert ((got.double() - layer.exact).abs() <= EPSILON[dtype] * layer.exact.abs()).all()


@pytest.mark.parametrize("rows", [1, 6])
def test_a_shared_sum_has_the_same_bits_every_time(rows: int) -> None:
    layer, x = Layer(32, 1024, 128), inputs(rows, 1024, torch.float16)
    plan = Plan("gemv", 1, 8, 1, 1) if rows == 1 else Plan("gemm", 16, 32, 4)
    first = layer.matmul(x, plan)
    assert all(torch.equal(layer.matmul(x, plan), first) for _ in range(3))


@pytest.mark.parametrize("k", [96, 200])
def test_what_lies_behind_a_row_does_not_matter(k: int) -> None:
    """The last chunk is not full, nor are the tiles of rows and of outputs."""
    layer = Layer(20, k, k if k == 200 else 32)
    poisoned = torch.full((3, 5, k), torch.nan, dtype=torch.float16)
    poisoned[1] = inputs(5, k, torch.float16)
    assert_exact_but_for_rounding(layer, poisoned[1], Plan("gemm", 16, 32, 1))
    assert_exact_but_for_rounding(layer, poisoned[1, 4:], Plan("gemv", 1, 8, 1, 1))


@pytest.mark.parametrize("rows", [1, 2, 40, 130])
def test_every_plan_that_is_proposed_computes_the_product(rows: int) -> None:
    layer, x = Layer(24, 512, 128), inputs(rows, 512, F16)
    exact = x.double() @ layer.exact.T
    for plan in w4a16.plans(rows, 24, 512, processors=4):
        got = layer.matmul(x, plan).double()
        assert (got - exact).abs().max() < 2e-3 * exact.abs().max(), str(plan)


def test_no_rows() -> None:
    assert Layer(8, 128, 128).matmul(inputs(0, 128, torch.float16), Plan("gemm", 16, 16)).shape == (
        0, 8,
    )  # fmt: skip


# ---- the backend ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 150])
def test_the_backend_packs_checks_and_multiplies(rows: int, dtype: torch.dtype) -> None:
    weight, backend = quantize_rtn(torch.randn(32, 256).half(), 64), CudaTriton()
    packed = backend.pack(weight, torch.device("cpu"), dtype)
    x = inputs(rows, 256, dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    shape = Shape.of(weight)
    assert (
        backend.matmul(x, packed, shape).double() - exact
    ).abs().max() < 0.02 * exact.abs().max()
    for plan in backend.plans(shape, rows, x.device):
        got = backend.run(plan, x, packed, shape).double()
        assert (got - exact).abs().max() < 0.02 * exact.abs().max(), plan


def test_the_backend_notices_what_is_packed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = w4a16.pack
    monkeypatch.setattr(
        w4a16, "pack", lambda *a: right(*a)._replace(words=right(*a).words.flip(1).contiguous())
    )
    with pytest.raises(BackendMismatch, match="disagrees"):
        CudaTriton().pack(quantize_rtn(torch.randn(32, 256), 64), torch.device("cpu"), DTYPES[0])
