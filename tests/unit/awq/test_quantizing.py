"""The canonical form, and rounding to nearest into it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.awq import QuantizedWeight, quantize_rtn


def upstream_rtn(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """llm-awq's `pseudo_quantize_tensor` with a zero point, group by group."""
    n, k = weight.shape
    q = torch.empty(n, k)
    scale, zero = torch.empty(n, k // group), torch.empty(n, k // group)
    for row in range(n):
        for g in range(k // group):
            w = weight[row, g * group : (g + 1) * group]
            s = (w.max() - w.min()).clamp(min=1e-5) / 15
            z = (-torch.round(w.min() / s)).clamp(0, 15)
            scale[row, g], zero[row, g] = s, z
            q[row, g * group : (g + 1) * group] = (torch.round(w / s) + z).clamp(0, 15)
    return q, scale, zero


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_is_upstreams_where_groups_have_both_signs(group: int) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(group))
    q, scale, zero = upstream_rtn(weight, group)
    got = quantize_rtn(weight, group)
    assert torch.equal(got.scale, scale)
    assert torch.equal(got.zero.float(), zero)
    assert torch.equal(got.q.float(), q)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000), shift=st.floats(-3, 3), spread=st.floats(1e-4, 10),
    group=st.sampled_from([32, 64]), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_a_weight_is_at_most_a_step_away(
    seed: int, shift: float, spread: float, group: int, dtype: torch.dtype
) -> None:
    """Half a step by rounding, half a step by a zero point that is whole, a little by fp16."""
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(4, 128, generator=generator) + shift) * spread).to(dtype)
    got = quantize_rtn(weight, group)
    error = (got.dequantize(torch.float32) - weight.float()).abs()
    step = got.scale.float().repeat_interleave(group, dim=1)
    assert (error <= step * 1.01 + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5, 1e-7])
def test_groups_of_a_single_value_are_kept(value: float) -> None:
    weight = torch.full((2, 64), value)
    got = quantize_rtn(weight, 64).dequantize(torch.float32)
    assert torch.allclose(got, weight, atol=1e-6, rtol=1e-3)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="100 inputs do not divide into groups of 64"):
        quantize_rtn(torch.zeros(2, 100), 64)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            quantize_rtn(torch.full((2, 64), bad), 64)


def random_weight(n: int = 8, k: int = 128, group: int = 64) -> QuantizedWeight:
    return quantize_rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), group)


def test_dequantising_rounds_once() -> None:
    weight = random_weight()
    exact = (weight.q.double().view(8, 2, 64) - weight.zero.double()[..., None]) * (
        weight.scale.double()[..., None]
    )
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        got = weight.dequantize(dtype)
        assert got.dtype == dtype
        assert torch.equal(got, exact.view(8, 128).to(torch.float32).to(dtype)) or torch.equal(
            got, exact.view(8, 128).to(dtype)
        )


def test_joined_layers_are_the_layers_one_after_the_other() -> None:
    parts = [random_weight(n) for n in (8, 16, 24)]
    joined = QuantizedWeight.cat(parts)
    assert (joined.out_features, joined.in_features, joined.group_size) == (48, 128, 64)
    expected = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert torch.equal(joined.dequantize(torch.float32), expected)
    assert QuantizedWeight.cat(parts[:1]) is parts[0]
    for other in (random_weight(k=256), random_weight(group=32)):
        with pytest.raises(ValueError, match="same inputs and group size"):
            QuantizedWeight.cat([parts[0], other])


@pytest.mark.parametrize("group", [0, 48])
def test_groups_must_divide_the_inputs(group: int) -> None:
    with pytest.raises(ValueError, match="do not divide into groups"):
        QuantizedWeight(torch.zeros(8, 128), torch.zeros(8, 2), torch.zeros(8, 2), group)


@pytest.mark.parametrize("shapes", [((8, 3), (8, 2)), ((8, 2), (7, 2)), ((2, 8), (2, 8))])
def test_scales_and_zeros_must_be_of_the_weights_shape(
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    scale, zero = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"has scales and zeros of \(8, 2\), not"):
        QuantizedWeight(torch.zeros(8, 128, dtype=torch.uint8), scale, zero, 64)
