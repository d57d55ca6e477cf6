"""The reader and the writer of llm-awq v2 agree with a derivation of the format by itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.awq.formats import FORMATS, QUANTIZED_SUFFIXES, TensorHeader
from models.awq.formats.groups import infer_group_size, zero_width
from models.awq.formats.llm_awq_v2 import LlmAwqV2, pack, unpack
from models.awq.quantized_weight import QuantizedWeight
from tests.unit.awq.derived import Layer, random_layer, read, scale_rows, write

SHAPES = [
    (8, 128, 128), (8, 64, 64), (8, 64, 32), (16, 256, 128), (24, 192, 64), (8, 320, 64),
    (32, 128, 32), (8, 384, 128), (12 * 8, 64, 32), (8, 1536, 128), (8, 288 * 2, 64),
]  # fmt: skip
every_shape = pytest.mark.parametrize(("n", "k", "group"), SHAPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])


def canonical(layer: Layer, dtype: torch.dtype) -> QuantizedWeight:
    return QuantizedWeight(
        torch.from_numpy(layer.q), torch.from_numpy(layer.scale).to(dtype),
        torch.from_numpy(layer.zero), layer.group,
    )  # fmt: skip


@every_shape
@every_dtype
def test_the_writer_writes_what_the_formula_says(
    n: int, k: int, group: int, dtype: torch.dtype
) -> None:
    layer = random_layer(n, k, group)
    expected, got = write(layer, dtype), pack(canonical(layer, dtype), dtype)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@every_shape
@every_dtype
def test_the_reader_reads_what_the_formula_says(
    n: int, k: int, group: int, dtype: torch.dtype
) -> None:
    layer = random_layer(n, k, group, seed=1)
    tensors = write(layer, dtype)
    got = unpack(tensors["qweight"], tensors["scales"], tensors["scaled_zeros"], group, k)
    assert np.array_equal(got.q.numpy(), layer.q)
    assert np.array_equal(got.zero.numpy(), layer.zero)
    assert np.array_equal(got.scale.double().numpy(), layer.scale)
    assert np.array_equal(got.dequantize(torch.float64).numpy(), layer.weight())
    # scaled_zeros is rounded to the file's dtype, so the formula itself is a rounding away.
    step = 15 * layer.scale.max() * torch.finfo(dtype).eps
    assert np.abs(read(tensors, group) - layer.weight()).max() <= step


@settings(max_examples=30)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 6), group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_what_is_written_is_read_back(
    rows: int, columns: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    n, k = 8 * rows, max(64, group) * columns
    generator = torch.Generator().manual_seed(seed)
    weight = QuantizedWeight(
        torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
        (torch.rand(n, k // group, generator=generator) * 0.1 + 1e-4).to(dtype),
        torch.randint(0, 16, (n, k // group), generator=generator, dtype=torch.uint8),
        group,
    )
    again = LlmAwqV2().unpack(pack(weight, dtype))
    assert again.group_size == group
    for name in ("q", "scale", "zero"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name


def test_released_shapes_have_the_released_numbers_of_rows() -> None:
    """Seen in upstream's files at groups of 128."""
    stored = {
        1536: 16, 2048: 16, 2560: 24, 3584: 32, 4096: 32, 5120: 40, 11008: 88, 13824: 112,
        14336: 112, 18944: 152,
    }  # fmt: skip
    for k, rows in stored.items():
        assert 8 * zero_width(k, 128) == rows
    for group in (32, 64, 128):
        for k in range(group, 6000, group):
            assert 8 * zero_width(k, group) == scale_rows(k, group)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("k", [128, 256, 384, 512, 1024, 1536, 2560, 4096, 11008])
def test_the_group_size_is_inferred_from_the_scales(group: int, k: int) -> None:
    scales = torch.zeros(scale_rows(k, group), 8)
    scales[: k // group] = 0.01
    assert infer_group_size(scales, k) == group


def test_small_layers_whose_padding_hides_the_group_size_are_told_apart() -> None:
    """256 inputs: eight rows in groups of 128 and of 256 alike."""
    for group, used in ((128, 2), (256, 1)):
        scales = torch.zeros(8, 8)
        scales[:used] = 0.01
        assert infer_group_size(scales, 256) == group


@pytest.mark.parametrize(("rows", "k"), [(9, 128), (8, 4096), (40, 128), (8, 96)])
def test_scales_that_fit_no_group_size_are_refused(rows: int, k: int) -> None:
    with pytest.raises(ValueError, match="fit no group size"):
        infer_group_size(torch.ones(rows, 8), k)


def test_two_group_sizes_that_fit_and_neither_number_of_rows_is_refused() -> None:
    scales = torch.zeros(8, 8)
    scales[:5] = 0.01
    with pytest.raises(ValueError, match="fit no group size"):
        infer_group_size(scales, 256)


@pytest.mark.parametrize(
    ("n", "k", "group"), [(12, 128, 128), (8, 96, 32), (8, 128, 16), (8, 192, 96)]
)
def test_shapes_that_the_format_has_no_place_for_are_refused(n: int, k: int, group: int) -> None:
    layer = random_layer(n, k, group)
    with pytest.raises(ValueError, match=f"not {n} x {k} in groups of {group}"):
        pack(canonical(layer, torch.float16), torch.float16)


# ---- detection ------------------------------------------------------------------------------


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorHeader]:
    return {name: TensorHeader(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def test_the_format_is_detected_by_its_tensors() -> None:
    (found,) = [entry for entry in FORMATS.values() if isinstance(entry, LlmAwqV2)]
    tensors = write(random_layer(8, 128, 128), torch.float16)
    assert found.matches(headers(tensors))
    assert not found.matches({})
    assert not found.matches(headers({"weight": torch.zeros(8, 128)}))
    # llm-awq v1 and AutoAWQ: int32 with qzeros. Never to be read as v2.
    old = {"qweight": torch.zeros(8, 16, dtype=torch.int32), "scales": torch.zeros(8, 8),
           "qzeros": torch.zeros(8, 1, dtype=torch.int32)}  # fmt: skip
    assert not found.matches(headers(old))
    assert {"qweight", "scales", "scaled_zeros"} <= QUANTIZED_SUFFIXES


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        (
            "qweight",
            torch.zeros(2, 64, dtype=torch.int16),
            r"has shape \(2, 64\), expected \(2, 128\)",
        ),
        (
            "qweight",
            torch.zeros(2, 128, dtype=torch.int32),
            "has dtype torch.int32, where llm-awq v2",
        ),
        ("scales", torch.zeros(24, 8), r"has shape \(24, 8\), expected \(8, 8\) or \(16, 8\) or"),
        (
            "scaled_zeros",
            torch.zeros(16, 8),
            r"has shape \(16, 8\), expected \(8, 8\) \(as scales\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_it_is_read(
    name: str, replacement: Tensor, message: str
) -> None:
    tensors = write(random_layer(8, 128, 128), torch.float16)
    assert LlmAwqV2().problem(headers(tensors), 8, 128) is None
    problem = LlmAwqV2().problem(headers({**tensors, name: replacement}), 8, 128)
    assert problem is not None and problem[0] == name
    assert re.search(message, problem[1])


@pytest.mark.parametrize(("n", "k"), [(6, 128), (8, 100)])
def test_a_config_that_asks_for_an_impossible_layer_is_named(n: int, k: int) -> None:
    tensors = write(random_layer(8, 128, 128), torch.float16)
    problem = LlmAwqV2().problem(headers(tensors), n, k)
    assert problem == ("qweight", f"cannot hold a layer of {n} x {k}, which the config asks for")


# ---- damage ---------------------------------------------------------------------------------


def damage(tensors: dict[str, Tensor], kind: str) -> None:
    scales, zeros = tensors["scales"], tensors["scaled_zeros"]
    if kind == "not a number":
        scales[0, 3] = float("nan")
    elif kind == "infinite":
        zeros[1, 0] = float("-inf")
    elif kind == "scales of zero":
        scales[1, 4] = 0
    elif kind == "sign lost":
        zeros.neg_()
    elif kind == "rows shifted":
        tensors["scaled_zeros"] = zeros.roll(1, 0)
    elif kind == "zero points beyond 15":
        zeros[0] = -16 * scales[0]
    else:
        zeros[0, 0] = -0.5 * scales[0, 0]


@pytest.mark.parametrize(
    "kind",
    ["not a number", "infinite", "scales of zero", "sign lost", "rows shifted",
     "zero points beyond 15", "half a zero point"],
)  # fmt: skip
@every_dtype
def test_damage_is_detected(kind: str, dtype: torch.dtype) -> None:
    tensors = write(random_layer(8, 384, 128), dtype)
    LlmAwqV2().unpack(tensors)
    damage(tensors, kind)
    with pytest.raises(ValueError, match="scaled_zeros are not"):
        LlmAwqV2().unpack(tensors)


def test_a_group_of_nothing_has_a_scale_of_zero_and_is_read_as_zeros() -> None:
    """Pruned rows: not what upstream writes, but a plain reading of the formula."""
    tensors = write(random_layer(8, 256, 128), torch.float16)
    tensors["scales"][0, 2] = tensors["scaled_zeros"][0, 2] = 0
    weight = LlmAwqV2().unpack(tensors).dequantize(torch.float32)
    assert not weight[2, :128].any() and weight[2, 128:].any()
