"""Every backend of the 4-bit linear computes x W^T + b of the dequantised weights."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, linear, quantize_rtn, select_backend
from models.awq.backends import BACKENDS, CHOICE
from models.awq.backends.base import BackendMismatch, Shape
from models.awq.backends.cpu_int4 import scale_and_offset
from models.awq.backends.cpu_int4_bf16 import MANY_ROWS
from models.awq.backends.cuda_int4 import INNER_K_TILES, CudaInt4, unpack_tinygemm
from models.errors import ConfigurationError
from models.native import kernels

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
CPU_BACKENDS = ["reference", "cpu_int4", "cpu_int4_bf16", *(["cpu_native"] if kernels() else [])]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_weight(
    n: int, k: int, group: int = 64, dtype: torch.dtype = torch.float16, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return quantize_rtn((torch.randn(n, k, generator=generator) / k**0.5).to(dtype), group)


def inputs(rows: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)


def build(
    weight: QuantizedWeight, backend: str, dtype: torch.dtype, bias: Tensor | None = None
) -> W4A16Linear:
    return W4A16Linear.from_quantized(weight, bias, backend=backend, device=CPU, dtype=dtype)


# ---- the reference --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "group"), [(8, 128, 128), (48, 192, 64), (24, 96, 32), (6, 80, 16)]
)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40])
def test_the_reference_is_dequantise_and_multiply_in_fp32(
    n: int, k: int, group: int, rows: int
) -> None:
    weight = random_weight(n, k, group)
    layer, x = build(weight, "reference", torch.float32), inputs(rows, k)
    assert layer.backend == "reference"
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert (layer(x) - exact).abs().max() < 1e-5
    # Bit for bit the product of torch's own linear, on whole blocks of rows.
    if rows % 16 == 0:
        assert torch.equal(layer(x), F.linear(x, weight.dequantize(torch.float32)))


@pytest.mark.parametrize("rows", [2, 7, 16, 33])
def test_a_row_of_the_reference_has_the_same_bits_in_any_batch(rows: int) -> None:
    layer, x = build(random_weight(64, 256), "reference", torch.float32), inputs(rows, 256)
    together = layer(x)
    for row in range(rows):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_fp16_scales_are_widened_before_bf16_is_rounded() -> None:
    weight = random_weight(16, 128, dtype=torch.float16)
    x = torch.eye(128, dtype=torch.bfloat16)
    got = build(weight, "reference", torch.bfloat16)(x)
    assert torch.equal(got.T, weight.dequantize(torch.bfloat16))


# ---- the layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 5, 128), (0, 128)])
def test_leading_dimensions_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    layer = build(random_weight(32, 128), backend, torch.bfloat16)
    assert layer.backend == backend
    assert layer(torch.ones(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 32)
    assert (layer.in_features, layer.out_features) == (128, 32)
    assert "out_features=32" in repr(layer) and backend in repr(layer)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_bias_is_added(backend: str) -> None:
    weight, x = random_weight(32, 128), inputs(3, 128, torch.bfloat16)
    bias = torch.arange(32.0)
    with_bias = build(weight, backend, torch.bfloat16, bias)(x)
    without = build(weight, backend, torch.bfloat16)(x)
    assert torch.equal(with_bias, without + bias.to(torch.bfloat16))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_fused_layers_are_the_separate_layers_joined(backend: str, rows: int) -> None:
    dtype = torch.float32 if backend == "reference" else torch.bfloat16
    parts = [random_weight(n, 128, seed=n) for n in (64, 32, 32)]
    x = inputs(rows, 128, dtype)
    fused = build(QuantizedWeight.cat(parts), backend, dtype)
    separate = [build(part, backend, dtype) for part in parts]
    assert fused.backend == backend
    joined = torch.cat([layer(x) for layer in separate], dim=-1)
    assert torch.allclose(
        fused(x), joined, atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-6
    )


# ---- the CPU's backend ----------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 2, 4, 17, 64])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
def test_the_cpu_backend_is_within_bf16_of_the_reference(
    group: int, rows: int, scales: torch.dtype
) -> None:
    weight = random_weight(48, 512, group, scales)
    layer, x = build(weight, "cpu_int4", torch.bfloat16), inputs(rows, 512, torch.bfloat16)
    assert layer.backend == "cpu_int4"
    exact = x.double() @ weight.dequantize(torch.float64).T
    got = layer(x)
    assert got.dtype == torch.bfloat16
    # The scale and the offset are rounded to bf16 (8 bits) before they meet 15 steps and K inputs.
    assert (got.double() - exact).abs().max() < 0.02 * exact.abs().max()
    assert (got.double() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("rows", [1, MANY_ROWS - 1, MANY_ROWS, 40])
def test_many_rows_go_through_the_16_bit_copy_and_few_through_the_4_bits(rows: int) -> None:
    weight, x = random_weight(48, 512), inputs(rows, 512, torch.bfloat16)
    got = build(weight, "cpu_int4_bf16", torch.bfloat16)(x)
    few = build(weight, "cpu_int4", torch.bfloat16)(x)
    many = F.linear(x, weight.dequantize(torch.bfloat16))
    assert not torch.equal(few, many)
    assert torch.equal(got, few if rows < MANY_ROWS else many)


def test_every_nibble_and_zero_point_has_its_place_in_the_cpu_backend() -> None:
    """One input at a time, scales a power of two: nothing is rounded, so nothing may differ."""
    generator = torch.Generator().manual_seed(3)
    weight = QuantizedWeight(
        torch.randint(0, 16, (32, 128), generator=generator, dtype=torch.uint8),
        torch.full((32, 4), 0.25),
        torch.randint(0, 16, (32, 4), generator=generator, dtype=torch.uint8),
        32,
    )
    got = build(weight, "cpu_int4", torch.bfloat16)(torch.eye(128, dtype=torch.bfloat16))
    assert torch.equal(got.T.float(), weight.dequantize(torch.float32))


def test_torchs_convention_is_the_same_numbers() -> None:
    weight = random_weight(8, 128, 32)
    scale, offset = scale_and_offset(weight).unbind(-1)
    q = weight.q.float().view(8, 4, 32)
    ours = weight.dequantize(torch.float32).view(8, 4, 32)
    assert torch.allclose((q - 8) * scale.T[..., None] + offset.T[..., None], ours, atol=1e-6)


# ---- who computes what ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "backend", "dtype", "reason"),
    [
        (random_weight(24, 128), "cpu_int4", torch.bfloat16, "24, is not a multiple of 16"),
        (random_weight(16, 128, 16), "cpu_int4", torch.bfloat16, "groups of 16 are none of"),
        (random_weight(16, 128), "cpu_int4", torch.float32, "it runs bfloat16 on the CPU only"),
        (random_weight(16, 128), "cuda_int4", torch.bfloat16, "it runs bfloat16 on a GPU only"),
    ],
)
def test_what_a_backend_cannot_do_the_reference_does_with_one_warning(
    weight: QuantizedWeight, backend: str, dtype: torch.dtype, reason: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(linear, "_warned", set())
    with caplog.at_level(logging.WARNING):
        layers = [build(weight, backend, dtype) for _ in range(3)]
    assert {layer.backend for layer in layers} == {"reference"}
    (record,) = caplog.records
    assert reason in record.getMessage() and backend in record.getMessage()
    x = inputs(3, 128, dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert (layers[0](x).double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_backend_whose_arithmetic_is_not_as_expected_is_replaced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mismatch(*_: object) -> dict[str, Tensor]:
        raise BackendMismatch("torch changed its order")

    monkeypatch.setattr(linear, "_warned", set())
    monkeypatch.setattr(BACKENDS["cpu_int4"], "pack", mismatch)
    with caplog.at_level(logging.WARNING):
        assert build(random_weight(16, 128), "cpu_int4", torch.bfloat16).backend == "reference"
    assert "torch changed its order" in caplog.text


def test_backends_are_chosen_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.awq.backends.kernels", lambda: None)
    chosen = {
        (device, dtype): select_backend(torch.device(device), dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert chosen.pop(("cpu", torch.bfloat16)) == "cpu_int4"
    assert select_backend(CPU, torch.bfloat16, bf16_copy=True) == "cpu_int4_bf16"
    assert select_backend(CPU, torch.float32, bf16_copy=True) == "reference"
    assert chosen.pop(("cuda", torch.bfloat16)) == chosen.pop(("cuda", torch.float16)) == CHOICE
    monkeypatch.setattr("models.awq.backends.kernels", object)
    for copy in (False, True):
        assert select_backend(CPU, torch.bfloat16, bf16_copy=copy) == "cpu_native"
    assert select_backend(CPU, torch.float32) == "reference"
    assert set(chosen.values()) == {"reference"}


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match="'marlin'; known: reference, cpu_int4, cpu_int4_bf16, cpu_native"
    ):
        build(random_weight(16, 128), "marlin", torch.float32)


def test_an_odd_number_of_inputs_is_refused_by_the_reference() -> None:
    problem = BACKENDS["reference"].unsupported(Shape(16, 33, 33), CPU, torch.float32)
    assert problem is not None and "odd" in problem


# ---- the GPU's backend ----------------------------------------------------------------------


def tinygemm_order(q: Tensor) -> Tensor:
    """(N, K) uint8 -> (N / 8, K / 128, 32, 4) int32, as torch's CUDA kernel
    `matrix_to_m16n8k16_Bint4_layout` lays it out, lane by lane."""
    n, k = q.shape
    tiles = torch.zeros(
        n // 8, k // (16 * INNER_K_TILES), 32, INNER_K_TILES // 2, dtype=torch.int64
    )
    for n_tile in range(tiles.shape[0]):
        for k_tile in range(tiles.shape[1]):
            for lane in range(32):
                row = q[n_tile * 8 + lane // 4].long()
                for inner in range(0, INNER_K_TILES, 2):
                    base = (k_tile * INNER_K_TILES + inner) * 16 + lane % 4 * 2
                    v = [int(row[base + step]) for step in (0, 1, 8, 9, 16, 17, 24, 25)]
                    word = (
                        v[7] << 28 | v[5] << 24 | v[3] << 20 | v[1] << 16
                        | v[6] << 12 | v[4] << 8 | v[2] << 4 | v[0]
                    )  # fmt: skip
                    tiles[n_tile, k_tile, lane, inner // 2] = word
    return tiles.to(torch.int32)


@pytest.mark.parametrize(("n", "k"), [(8, 128), (24, 128), (8, 384), (16, 256)])
def test_tinygemms_packing_is_undone(n: int, k: int) -> None:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(unpack_tinygemm(tinygemm_order(q)), q)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's two CUDA operators, emulated on the CPU from what they are documented to do."""

    def convert(pairs: Tensor, inner_k_tiles: int) -> Tensor:
        assert inner_k_tiles == INNER_K_TILES and pairs.dtype == torch.uint8
        return tinygemm_order(torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1))

    def matmul(x: Tensor, packed: Tensor, group: int, scale_offset: Tensor) -> Tensor:
        q = unpack_tinygemm(packed).double()
        scale, offset = scale_offset.double().unbind(-1)
        repeat = {"repeats": group, "dim": 1}
        weight = (q - 8) * scale.T.repeat_interleave(**repeat) + offset.T.repeat_interleave(
            **repeat
        )
        return (x.double() @ weight.T).to(x.dtype)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", matmul)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("group", [32, 128])
def test_the_gpu_backends_two_ways_compute_the_same(emulated: None, rows: int, group: int) -> None:
    """Few rows by tinygemm, many by the weights unpacked from its order."""
    weight, backend = random_weight(16, 256, group), CudaInt4()
    packed = backend.pack(weight, CPU, torch.bfloat16)
    x = inputs(rows, 256, torch.bfloat16)
    exact = x.double() @ weight.dequantize(torch.float64).T
    got = backend.matmul(x, packed, Shape.of(weight)).double()
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_gpu_backend_notices_another_order_and_another_product(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, backend = random_weight(16, 256), CudaInt4()
    backend.pack(weight, CPU, torch.bfloat16)
    convert, matmul = (
        torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.ops.aten,
            "_convert_weight_to_int4pack",
            lambda q, tiles: convert(q, tiles).flip(2),
        )
        with pytest.raises(BackendMismatch, match="another order"):
            backend.pack(weight, CPU, torch.bfloat16)
    monkeypatch.setattr(
        torch.ops.aten, "_weight_int4pack_mm",
        lambda x, packed, group, scales: matmul(x, packed, group, scales.roll(1, 0)),
    )  # fmt: skip
    with pytest.raises(BackendMismatch, match="disagrees"):
        backend.pack(weight, CPU, torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("backend", ["reference", "cuda_int4", "cuda_triton"])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 200])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_backends_on_a_gpu_are_within_bf16_of_the_exact_product(
    backend: str, rows: int, group: int
) -> None:
    weight = random_weight(384, 512, group)
    layer = W4A16Linear.from_quantized(
        weight, None, backend=backend, device=CUDA, dtype=torch.bfloat16
    )
    assert layer.backend == backend, "the self-check at packing found a mismatch"
    x = inputs(rows, 512, torch.bfloat16)
    exact = x.double() @ weight.dequantize(torch.float64).T
    got = layer(x.to(CUDA)).cpu().double()
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()
