"""Every format's reader, writer and header check, against derivations of the formats by themselves.

What only llm-awq v2 has (its interleaving, scaled zeros) is in `test_llm_awq_v2.py`.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, quantize_rtn
from models.awq.backends import BACKENDS
from models.awq.backends.base import Shape
from models.awq.formats import FORMATS, QUANTIZED_SUFFIXES, TensorHeader, detect
from models.errors import CheckpointError
from tests.unit.awq.derived import Layer, random_layer
from tests.unit.awq.derived_formats import WRITERS

CPU = torch.device("cpu")
ONE_READER = {"llm-awq-v0": "autoawq-gemm"}
"""Formats of the same tensors: the second name is the one that is recognised."""
SHAPES = [
    (8, 128, 128), (8, 64, 64), (16, 64, 32), (24, 128, 32), (16, 384, 128), (8, 1152, 128),
    (128, 128, 64), (40, 192, 64), (64, 64, 32),
]  # fmt: skip
every_format = pytest.mark.parametrize("name", FORMATS)
every_shape = pytest.mark.parametrize(("n", "k", "group"), SHAPES)


def layer_for(name: str, n: int, k: int, group: int, seed: int = 0) -> Layer:
    layer = random_layer(n, k, group, seed)
    if FORMATS[name].symmetric:
        return layer._replace(zero=np.full_like(layer.zero, 8))
    return layer


def canonical(layer: Layer, dtype: torch.dtype) -> QuantizedWeight:
    return QuantizedWeight(
        torch.from_numpy(layer.q), torch.from_numpy(layer.scale).to(dtype),
        torch.from_numpy(layer.zero), layer.group,
    )  # fmt: skip


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorHeader]:
    return {name: TensorHeader(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def assert_same(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert got.group_size == expected.group_size
    for name in ("q", "scale", "zero"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


# ---- reading and writing --------------------------------------------------------------------


def test_every_format_is_derived_here() -> None:
    assert set(FORMATS) == set(WRITERS)
    with pytest.raises(CheckpointError, match="unknown AWQ format 'v3'; known: llm-awq-v2, "):
        FORMATS["v3"]


@every_format
@every_shape
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_writer_writes_what_the_formula_says(
    name: str, n: int, k: int, group: int, dtype: torch.dtype
) -> None:
    layer = layer_for(name, n, k, group)
    expected, got = WRITERS[name](layer, dtype), FORMATS[name].pack(canonical(layer, dtype), dtype)
    assert got.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert got[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(got[suffix], tensor), suffix
        assert got[suffix].is_contiguous(), "as safetensors wants it"


@every_format
@every_shape
def test_the_reader_reads_what_the_formula_says(name: str, n: int, k: int, group: int) -> None:
    layer = layer_for(name, n, k, group, seed=1)
    got = FORMATS[name].unpack(WRITERS[name](layer, torch.float16))
    assert_same(got, canonical(layer, torch.float16))
    assert np.array_equal(got.dequantize(torch.float64).numpy(), layer.weight())


@settings(max_examples=40)
@given(
    name=st.sampled_from([*FORMATS]), rows=st.integers(1, 6), columns=st.integers(1, 7),
    group=st.sampled_from([32, 64, 128]), dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_what_is_written_is_recognised_fits_and_is_read_back(
    name: str, rows: int, columns: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    n, k = 8 * rows, max(64, group) * columns
    weight = canonical(layer_for(name, n, k, group, seed), dtype)
    tensors = FORMATS[name].pack(weight, dtype)
    assert detect(headers(tensors)) == ONE_READER.get(name, name)
    assert FORMATS[name].problem(headers(tensors), n, k) is None
    assert_same(FORMATS[name].unpack(tensors), weight)


@pytest.mark.parametrize("name", ["compressed-tensors", "compressed-tensors-symmetric"])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 96, 32), (1, 20, 10), (13, 36, 12), (9, 64, 64)])
def test_compressed_tensors_pads_sizes_that_fill_no_word(
    name: str, n: int, k: int, group: int
) -> None:
    layer = layer_for(name, n, k, group)
    tensors = WRITERS[name](layer, torch.float16)
    assert FORMATS[name].problem(headers(tensors), n, k) is None
    assert_same(FORMATS[name].unpack(tensors), canonical(layer, torch.float16))
    for suffix, tensor in FORMATS[name].pack(canonical(layer, torch.float16), torch.half).items():
        assert torch.equal(tensor, tensors[suffix]), suffix


@pytest.mark.parametrize("name", ["autoawq-gemm", "compressed-tensors"])
def test_group_sizes_that_llm_awq_does_not_know(name: str) -> None:
    """16, and one group for all inputs."""
    for group in (16, 192):
        layer = layer_for(name, 16, 192, group)
        tensors = WRITERS[name](layer, torch.float16)
        assert FORMATS[name].problem(headers(tensors), 16, 192) is None
        assert_same(FORMATS[name].unpack(tensors), canonical(layer, torch.float16))


@pytest.mark.parametrize(
    ("name", "n", "k", "group", "message"),
    [
        ("llm-awq-v1", 12, 128, 128, "not 12 x 128 in groups of 128"),
        ("llm-awq-v1", 8, 96, 16, "not 8 x 96 in groups of 16"),
        ("autoawq-gemm", 12, 128, 128, "multiple of 8, not 12 x 128"),
    ],
)
def test_shapes_that_a_format_has_no_place_for_are_refused(
    name: str, n: int, k: int, group: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FORMATS[name].pack(canonical(random_layer(n, k, group), torch.float16), torch.float16)


def test_symmetric_weights_have_the_zero_point_8_and_the_writer_takes_no_other() -> None:
    entry = FORMATS["compressed-tensors-symmetric"]
    assert entry.symmetric
    with pytest.raises(ValueError, match="no other zero point than 8"):
        entry.pack(canonical(random_layer(8, 128, 128), torch.float16), torch.float16)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rtn(weight, 64, symmetric=True)
    assert_same(entry.unpack(entry.pack(quantized, torch.float32)), quantized)
    assert bool((quantized.zero == 8).all())
    # compressed-tensors' formula: the largest magnitude is 7.5 steps.
    grouped = weight.view(8, 4, 64)
    assert torch.allclose(quantized.scale, grouped.abs().amax(-1) / 7.5)
    step = quantized.scale.repeat_interleave(64, dim=1)
    error = (quantized.dequantize(torch.float32) - weight).abs()
    assert bool((error <= 0.5 * step + 1e-6).all())


# ---- detection ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_square_layers_are_told_apart(name: str, group: int) -> None:
    """N = K: the weights of llm-awq v1 and AutoAWQ GEMM have the same shape and dtype."""
    for size in (128, 256):
        tensors = WRITERS[name](layer_for(name, size, size, group), torch.float16)
        assert detect(headers(tensors)) == ONE_READER.get(name, name)


def test_every_shape_of_either_int32_format_is_told_apart_without_the_config() -> None:
    """Also where one format's shapes are those of the other for the transposed layer."""
    for group in (32, 64, 128):
        for n in (8, 16, 32, 64, 128, 256, 1024, 4096):
            for k in (128, 256, 1024, 4096):
                weight = QuantizedWeight(
                    torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, k // group),
                    torch.zeros(n, k // group, dtype=torch.uint8), group,
                )  # fmt: skip
                for name in ("llm-awq-v1", "autoawq-gemm"):
                    found = headers(FORMATS[name].pack(weight, torch.float16))
                    assert detect(found) == name, (name, n, k, group)


def test_what_is_no_4_bit_layer_of_ours_is_not_recognised() -> None:
    assert detect({}) is None
    assert detect(headers({"weight": torch.zeros(8, 128), "bias": torch.zeros(8)})) is None
    gptq = {
        "qweight": torch.zeros(16, 8, dtype=torch.int32), "scales": torch.zeros(1, 8),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32), "g_idx": torch.zeros(128),
    }  # fmt: skip
    assert detect(headers(gptq)) is None
    fp8 = {"weight": torch.zeros(8, 8), "weight_scale": torch.zeros(8, 1)}
    assert detect(headers(fp8)) is None
    assert {"qzeros", "weight_packed", "weight_zero_point", "weight_g_idx"} <= QUANTIZED_SUFFIXES


@pytest.mark.parametrize("lost", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", ["llm-awq-v1", "autoawq-gemm"])
def test_a_layer_that_lost_a_tensor_is_still_one_of_the_int32_formats(name: str, lost: str) -> None:
    tensors = WRITERS[name](layer_for(name, 16, 128, 64), torch.float16)
    del tensors[lost]
    assert detect(headers(tensors)) in ("llm-awq-v1", "autoawq-gemm")


# ---- header checks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix", "replacement", "message"),
    [
        ("llm-awq-v1", "qweight", torch.zeros(15, 16, dtype=torch.int32),
         "has shape (15, 16), expected "),
        ("llm-awq-v1", "qweight", torch.zeros(16, 8, dtype=torch.int32),
         "has shape (16, 8), expected (16, 16) (AutoAWQ GEMM and llm-awq v0: (128, 2))"),
        ("llm-awq-v1", "qzeros", torch.zeros(16, 3, dtype=torch.int32),
         "has shape (16, 3), expected (16, 2) (an eighth of scales)"),
        ("llm-awq-v1", "qzeros", torch.zeros(16, 2),
         "has dtype torch.float32, where llm-awq v1 has torch.int32"),
        ("llm-awq-v1", "scales", torch.zeros(16, 24),
         "has shape (16, 24), expected (16, 8) or (16, 16) or (16, 32)"),
        ("llm-awq-v1", "scales", torch.zeros(16, 16, dtype=torch.int32),
         "has dtype torch.int32, where llm-awq v1 has torch.float16 or "),
        ("autoawq-gemm", "qweight", torch.zeros(128, 3, dtype=torch.int32),
         "has shape (128, 3), expected (128, 2) (llm-awq v1: (16, 16))"),
        ("autoawq-gemm", "qweight", torch.zeros(127, 2, dtype=torch.int32),
         "has shape (127, 2), expected (128, 2) (llm-awq v1: (16, 16))"),
        ("autoawq-gemm", "qweight", torch.zeros(128, 2, dtype=torch.int64),
         "has dtype torch.int64, where AutoAWQ GEMM has torch.int32"),
        ("autoawq-gemm", "scales", torch.zeros(3, 16),
         "has shape (3, 16), expected (1, 16) or (2, 16) or (4, 16)"),
        ("autoawq-gemm", "scales", torch.zeros(2, 15), "has shape (2, 15), expected (2, 16)"),
        ("autoawq-gemm", "qzeros", torch.zeros(1, 2, dtype=torch.int32),
         "has shape (1, 2), expected (2, 2) (an eighth of scales)"),
        ("compressed-tensors", "weight_packed", torch.zeros(16, 15, dtype=torch.int32),
         "has shape (16, 15), expected (16, 16)"),
        ("compressed-tensors", "weight_packed", torch.zeros(16, 16, dtype=torch.uint8),
         "has dtype torch.uint8, where compressed-tensors has torch.int32"),
        ("compressed-tensors", "weight_scale", torch.zeros(16, 5),
         "has shape (16, 5), expected (16, 1) or (16, 2) or (16, 4)"),
        ("compressed-tensors", "weight_scale", torch.zeros(16, 2, dtype=torch.int8),
         "has dtype torch.int8, where compressed-tensors has torch.float16 or "),
        ("compressed-tensors", "weight_shape", torch.zeros(3, dtype=torch.int64),
         "has shape (3,), expected (2,)"),
        ("compressed-tensors", "weight_shape", torch.zeros(2),
         "has dtype torch.float32, where compressed-tensors has torch.int64 or torch.int32"),
        ("compressed-tensors", "weight_zero_point", torch.zeros(16, 2, dtype=torch.int32),
         "has shape (16, 2), expected (2, 2)"),
        ("compressed-tensors", "weight_zero_point", torch.zeros(16, 2, dtype=torch.int8),
         "has dtype torch.int8, where compressed-tensors has torch.int32"),
        ("compressed-tensors", "weight_g_idx", torch.zeros(100), "has shape (100,), expected (128"),
        ("compressed-tensors-symmetric", "weight_packed", torch.zeros(8, 16, dtype=torch.int32),
         "has shape (8, 16), expected (16, 16)"),
        ("llm-awq-v2", "scales", torch.zeros(16, 16, dtype=torch.int32),
         "has dtype torch.int32, where llm-awq v2 has torch.float16 or "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_before_it_is_read(
    name: str, suffix: str, replacement: Tensor, message: str
) -> None:
    tensors = WRITERS[name](layer_for(name, 16, 128, 64), torch.float16)
    assert FORMATS[name].problem(headers(tensors), 16, 128) is None
    damaged = headers({**tensors, suffix: replacement})
    found = detect(damaged)
    assert found is not None, "recognised nevertheless, so that the message can be this one"
    problem = FORMATS[found].problem(damaged, 16, 128)
    assert problem is not None and problem[0] == suffix
    assert problem[1].startswith(message)


@every_format
def test_every_wrong_shape_of_every_tensor_is_named(name: str) -> None:
    """Cut, grown and without dimensions; whatever format it then looks like."""
    n, k = 128, 128
    tensors = WRITERS[name](layer_for(name, n, k, 32), torch.float16)
    for suffix, tensor in tensors.items():
        wrongs = [tensor[:-1], tensor[:0], tensor[0], tensor[None]]
        wrongs += [torch.cat([tensor, tensor[:1]])] if tensor.dim() else []
        wrongs += [tensor[:, :-1], tensor[:, :0]] if tensor.dim() > 1 else []
        for wrong in wrongs:
            damaged = headers({**tensors, suffix: wrong})
            found = detect(damaged)
            assert found is not None
            assert FORMATS[found].problem(damaged, n, k) is not None, (suffix, wrong.shape)


@every_format
@pytest.mark.parametrize(("n", "k"), [(16, 256), (32, 128), (24, 128), (16, 192)])
def test_a_layer_of_other_sizes_than_the_config_asks_for_is_named(
    name: str, n: int, k: int
) -> None:
    tensors = headers(WRITERS[name](layer_for(name, 16, 128, 64), torch.float16))
    problem = FORMATS[name].problem(tensors, n, k)
    assert problem is not None and problem[0] in ("qweight", "weight_packed")


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [("llm-awq-v1", 16, 100), ("autoawq-gemm", 12, 128), ("llm-awq-v2", 16, 100)],
)
def test_a_config_that_asks_for_an_impossible_layer_is_named(name: str, n: int, k: int) -> None:
    tensors = headers(WRITERS[name](layer_for(name, 16, 128, 64), torch.float16))
    expected = f"cannot hold a layer of {n} x {k}, which the config asks for"
    assert FORMATS[name].problem(tensors, n, k) == ("qweight", expected)


# ---- damage ---------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(name: str, value: float) -> None:
    tensors = WRITERS[name](layer_for(name, 16, 128, 64), torch.float16)
    scales = tensors.get("scales", tensors.get("weight_scale"))
    assert scales is not None
    scales[0, 0] = value
    with pytest.raises(ValueError, match="not finite|scaled_zeros are not"):
        FORMATS[name].unpack(tensors)


@pytest.mark.parametrize("shape", [(16, 136), (15, 128), (128, 16)])
def test_a_weight_shape_that_the_tensor_contradicts_is_refused(shape: tuple[int, int]) -> None:
    tensors = WRITERS["compressed-tensors"](random_layer(16, 128, 64), torch.float16)
    tensors["weight_shape"] = torch.tensor(shape)
    with pytest.raises(ValueError, match=re.escape(f"says {shape[0]} x {shape[1]}, which weight_")):
        FORMATS["compressed-tensors"].unpack(tensors)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_order_of_inputs_is_refused_unless_it_is_the_plain_one(dtype: torch.dtype) -> None:
    layer = random_layer(16, 128, 64)
    tensors = WRITERS["compressed-tensors"](layer, torch.float16)
    read = FORMATS["compressed-tensors"].unpack
    plain = torch.tensor([k // 64 for k in range(128)], dtype=dtype)
    for order in (plain, torch.full_like(plain, -1)):
        assert FORMATS["compressed-tensors"].problem(
            headers({**tensors, "weight_g_idx": order}), 16, 128
        ) is None  # fmt: skip
        assert_same(
            read({**tensors, "weight_g_idx": order}), canonical(layer, torch.float16)
        )  # fmt: skip
    for order in (plain.flip(0), torch.arange(128, dtype=dtype) % 2, torch.zeros_like(plain)):
        with pytest.raises(ValueError, match="weight_g_idx .* not supported; quantise with"):
            read({**tensors, "weight_g_idx": order})


def test_scales_whose_number_divides_no_inputs_are_refused() -> None:
    for name, suffix in (("autoawq-gemm", "scales"), ("compressed-tensors", "weight_scale")):
        tensors = WRITERS[name](random_layer(16, 128, 64), torch.float16)
        tensors[suffix] = torch.ones(3, 16) if suffix == "scales" else torch.ones(16, 3)
        with pytest.raises(ValueError, match="128 inputs do not divide into 3 groups"):
            FORMATS[name].unpack(tensors)


# ---- what is computed -----------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("group", [32, 64, 128])
def test_outputs_are_those_of_the_dequantised_weights(name: str, group: int) -> None:
    layer = layer_for(name, 64, 256, group)
    weight = FORMATS[name].unpack(WRITERS[name](layer, torch.float16))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ torch.from_numpy(layer.weight()).T
    for backend, dtype, tolerance in (
        ("reference", torch.float32, 1e-6), ("cpu_int4", torch.bfloat16, 2e-2),
    ):  # fmt: skip
        linear = W4A16Linear.from_quantized(weight, backend=backend, device=CPU, dtype=dtype)
        assert linear.backend == backend, "it takes this group size itself"
        error = (linear(x.to(dtype)).double() - exact).abs().max()
        assert error <= tolerance * exact.abs().max()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_backend_takes_groups_of(group: int) -> None:
    """Of its shape, that is: what it says of the device or dtype is another matter."""
    for name, dtype in (("reference", torch.float32), ("cpu_int4", torch.bfloat16)):
        assert BACKENDS[name].unsupported(Shape(128, 256, group), CPU, dtype) is None
    problem = BACKENDS["cuda_int4"].unsupported(Shape(128, 256, group), CPU, torch.bfloat16)
    assert problem is not None and "groups" not in problem


def test_a_layer_packed_in_parts_is_the_layer_packed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = canonical(random_layer(208, 128, 64), torch.float16)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q.to(torch.int32), 1)
    for chunk in (1, 128 * 64, 128 * 130, 2**20):
        monkeypatch.setattr("models.awq.backends.cpu_int4.CHUNK", chunk)
        packed = BACKENDS["cpu_int4"].pack(weight, CPU, torch.bfloat16)
        assert torch.equal(packed["weight"], whole)
