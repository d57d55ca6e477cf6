"""Norm, rotary positions and SwiGLU: the same bits as torch's operators, one after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.gpu.device import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE_STEP = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The relative distance of neighbouring numbers, at most; twice that in float32, where sums are
taken in another order and exponentials are other approximations."""


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def check_close(got: Tensor, wanted: Tensor, steps: float = 1) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    got, wanted, step = got.cpu().double(), wanted.double(), ONE_STEP[wanted.dtype]
    assert ((got - wanted).abs() <= steps * step * wanted.abs() + 1e-6).all()


def norm_of(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float64 but for the two roundings."""
    wide = x.double()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return (weight.double() * normed.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 96), (3, 1000), (2, 4096)])
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    from models.gpu.norm import add_rms_norm, rms_norm

    x, delta, weight = (random(n, size, dtype=dtype) for n in (rows, rows, 1))
    weight = weight[0]
    on_device = [t.to(DEVICE) for t in (x, delta, weight)]
    check_close(rms_norm(on_device[0], on_device[2], 1e-5), norm_of(x, weight, 1e-5), steps=2)
    total, normed = add_rms_norm(*on_device, 1e-5)
    check_close(total, x + delta)
    check_close(normed, norm_of(total.cpu(), weight, 1e-5), steps=2)
    if dtype != torch.float32:
        assert torch.equal(total.cpu(), x + delta)
    for given, kept in zip(on_device, (x, delta, weight), strict=True):
        assert torch.equal(given.cpu(), kept), "nothing that was given is written to"


def test_a_norm_of_zeros_is_zeros() -> None:
    from models.gpu.norm import rms_norm

    x = torch.zeros(2, 64, device=DEVICE)
    assert not rms_norm(x, torch.ones(64, device=DEVICE), 1e-5).any()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 48), (3, 1024), (2, 2500)])
def test_swiglu(rows: int, size: int, dtype: torch.dtype) -> None:
    from models.gpu.activation import swiglu

    gate_up = 4 * random(rows, 2 * size, dtype=dtype)
    gate_up[0, :3] = torch.tensor([-100.0, 100.0, 0.0])
    gate, up = gate_up.chunk(2, dim=-1)
    check_close(swiglu(gate_up.to(DEVICE)), F.silu(gate) * up, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (7, 1, 128), (6, 2, 96), (2, 1, 16)]
)
def test_rotary_positions_and_the_caches_new_entries(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    from models.gpu.rotary import rotate_and_store

    tokens, blocks, size = 5, 4, 16
    qkv = random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = torch.outer(torch.arange(3.0, 3.0 + tokens), torch.arange(head_dim // 2) * 0.1)
    cos, sin = (torch.cat((t, t), -1).to(dtype).unsqueeze(1) for t in (angles.cos(), angles.sin()))
    slots = torch.tensor([17, 0, -1, 63, 18], dtype=torch.int32)
    keys, values = (
        torch.full((blocks, kv_heads, size, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        for _ in range(2)
    )
    q = rotate_and_store(
        qkv.clone().to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), slots.to(DEVICE), keys, values
    )

    first, second = qkv.chunk(2, dim=-1)
    turned = qkv * cos + torch.cat((-second, first), dim=-1) * sin
    check_close(q, turned[:, :heads])
    keys, values = keys.cpu(), values.cpu()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, size)
            check_close(keys[block, :, offset], turned[token, heads : heads + kv_heads])
            assert torch.equal(values[block, :, offset], qkv[token, heads + kv_heads :])
    written = ~keys.isnan().any(-1).any(1).flatten()
    assert written.nonzero().flatten().tolist() == [0, 17, 18, 63], "and nothing else"
    assert torch.equal(keys.isnan(), values.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_bits_are_those_of_separate_operations(dtype: torch.dtype) -> None:
    """As `models.language.rope` computes them, on the same device. Float32's may be fused there."""
    from models.gpu.rotary import rotate_and_store
    from models.language.rope import rotate

    if dtype == torch.float32 and DEVICE.type == "cuda":
        pytest.skip("the GPU adds a product without rounding it first")
    qkv = random(9, 6, 64, dtype=dtype).to(DEVICE)
    angles = torch.outer(torch.arange(9.0), torch.arange(32) * 0.1).to(DEVICE)
    cos, sin = (torch.cat((t, t), -1).to(dtype).unsqueeze(1) for t in (angles.cos(), angles.sin()))
    cache = torch.zeros(1, 2, 16, 64, dtype=dtype, device=DEVICE)
    wanted = rotate(qkv[:, :2], cos, sin)
    slots = torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(rotate_and_store(qkv, cos, sin, slots, cache, cache), wanted)
