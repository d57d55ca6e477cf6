"""Norms, SwiGLU and rotary positions against their formulas in float64, and against torch in
bfloat16, which rounds at the same places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.language import fused
from models.language.rope import rotate
from models.native import Kernels, kernels

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)
SHAPES = [(1, 256), (3, 100), (33, 2048), (2, 7)]
UNIT = 2**-8  # of bfloat16's last place, at most


def library() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def assert_close(got: Tensor, wanted: Tensor, units: float) -> None:
    assert got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= units * UNIT * wanted.abs() + 1e-30).all()


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_rms_norm(rows: int, size: int) -> None:
    x, delta = (10 * torch.randn(rows, size).bfloat16() for _ in range(2))
    weight = torch.randn(size).bfloat16()

    def formula(wide: Tensor) -> Tensor:
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert_close(fused.rms_norm(x, weight, 1e-5), formula(x.double()), 2)
    total = x + delta
    added, normed = fused.add_rms_norm(x.clone(), delta, weight, 1e-5)
    assert torch.equal(added, total)
    assert_close(normed, formula(total.double()), 2)


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_swiglu(rows: int, size: int) -> None:
    gate_up = 8 * torch.randn(rows, 2 * size).bfloat16()
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(fused.swiglu(gate_up), gate / (1 + (-gate).exp()) * up, 2)


def test_swiglu_of_extremes() -> None:
    gates = torch.tensor([[-3e38, -200.0, -100.0, 0.0, 100.0, 3e38, torch.nan]]).bfloat16()
    got = fused.swiglu(torch.cat((gates, torch.ones_like(gates)), dim=-1))
    assert got.nan_to_num(7).tolist() == [[0, 0, 0, 0, 100.0, float(gates[0, 5]), 7]]


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 2, 2), (5, 6, 2), (200, 4, 1)])
def test_rotation_has_torchs_bits_and_keys_and_values_go_to_their_slots(
    tokens: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).bfloat16()
    angles = torch.rand(tokens, 1, head_dim // 2).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    wanted = rotate(qkv[:, : heads + kv_heads], cos, sin)
    new_values = qkv[:, heads + kv_heads :].clone()
    keys, values = torch.full((2, tokens // 16 + 2, kv_heads, 16, head_dim), 7.0).bfloat16()
    slots = torch.randperm(keys[..., 0].numel())[: tokens * kv_heads].view(tokens, kv_heads)
    q = library().rotate_and_store(qkv, cos, sin, slots, keys, values)
    assert torch.equal(q, wanted[:, :heads])
    assert torch.equal(keys.flatten(0, 2)[slots], wanted[:, heads:])
    assert torch.equal(values.flatten(0, 2)[slots], new_values)
    untouched = torch.ones(keys[..., 0].numel(), dtype=torch.bool)
    untouched[slots.flatten()] = False
    assert (keys.flatten(0, 2)[untouched] == 7).all()
    assert (values.flatten(0, 2)[untouched] == 7).all()


def test_two_threads_give_the_same_bits() -> None:
    x, weight = torch.randn(100, 1000).bfloat16(), torch.randn(1000).bfloat16()
    alone = fused.rms_norm(x, weight, 1e-6), fused.swiglu(x)
    torch.set_num_threads(2)
    assert torch.equal(fused.rms_norm(x, weight, 1e-6), alone[0])
    assert torch.equal(fused.swiglu(x), alone[1])
