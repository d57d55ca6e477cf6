"""Backends that are other people's packages: what they are asked, and that nothing they might do
can give a wrong answer. Stand-ins take the packages' place, with their sources' signatures."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.awq import QuantizedWeight, quantize_rtn
from models.awq.backends.base import BackendMismatch, Shape
from models.awq.backends.cuda_gemlite import CudaGemlite
from models.awq.backends.cuda_humming import CudaHumming
from models.awq.backends.self_check import check_product, failures_as_mismatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
F16 = torch.float16


def weight(n: int = 64, k: int = 128, group: int = 32) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return quantize_rtn((torch.randn(n, k, generator=generator) / k**0.5).half(), group)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


def dequantized(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    group = q.shape[1] // scale.shape[1]
    wide = {"repeats": group, "dim": 1}
    return (q.float() - zero.float().repeat_interleave(**wide)) * scale.float().repeat_interleave(
        **wide
    )


@pytest.fixture
def gemlite(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Keeps what it is given, and multiplies by it."""
    behaviour = SimpleNamespace(change=lambda y: y)

    class A16W4:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def from_weights(self, q: Tensor, scales: Tensor, zeros: Tensor) -> SimpleNamespace:
            assert q.dtype == torch.uint8 and scales.dtype == zeros.dtype == self.dtype
            tensors = [torch.nn.Parameter(t, requires_grad=False) for t in (q, scales, zeros)]
            return SimpleNamespace(
                get_tensor_args=lambda: [*tensors, torch.tensor(0.0)],
                get_meta_args=lambda: [1, 2, 3],
            )

    def forward_functional(
        x: Tensor, bias: Tensor | None, tensor_args: list[Tensor], meta_args: list[int]
    ) -> Tensor:
        assert bias is None and meta_args == [1, 2, 3] and len(tensor_args) == 4
        return behaviour.change((x.float() @ dequantized(*tensor_args[:3]).T).to(x.dtype))

    module(monkeypatch, "gemlite")
    module(monkeypatch, "gemlite.helper", A16W4_HQQ_INT=A16W4)
    module(monkeypatch, "gemlite.core", forward_functional=forward_functional)
    return behaviour


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Unpacks what it is given, and multiplies by it."""
    behaviour = SimpleNamespace(change=lambda y: y)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def pack_weight(inputs: Tensor, num_bits: int) -> Tensor:
        assert inputs.dtype == torch.int32 and inputs.is_contiguous() and num_bits == 4
        assert inputs.shape[-1] % 32 == 0
        words = inputs.view(*inputs.shape[:-1], -1, 8).long() << shifts.long()
        return words.sum(-1).to(torch.int32)

    def unpack(words: Tensor) -> Tensor:
        return (words.unsqueeze(-1) >> shifts & 15).flatten(-2)

    def prepare(
        tensors: dict[str, Tensor], shape_n: int, shape_k: int, weight_schema: Any,
        *, torch_dtype: torch.dtype, device: torch.device,
    ) -> tuple[str, dict[str, Tensor]]:  # fmt: skip
        groups = shape_k // weight_schema.weight_scale_group_size
        assert tensors["weight"].shape == (shape_n, shape_k // 8)
        assert tensors["weight_scale"].shape == (shape_n, groups)
        assert tensors["weight_scale"].dtype == torch_dtype == weight_schema.bs_dtype
        assert tensors["zero_point"].shape == (shape_n // 8, groups)
        assert weight_schema.has_zero_point and weight_schema.b_dtype == "uint4"
        return "configuration", tensors

    def forward(
        config: str, inputs: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor,
        locks: Tensor,
    ) -> Tensor:  # fmt: skip
        assert config == "configuration" and inputs.is_contiguous() and not locks.any()
        zero = unpack(zero_point.T.contiguous()).T
        y = inputs.float() @ dequantized(unpack(weight), weight_scale, zero).T
        return behaviour.change(y.to(inputs.dtype))

    data_type = SimpleNamespace(from_str=str, from_torch_dtype=lambda dtype: dtype)
    module(
        monkeypatch, "humming",
        dtypes=SimpleNamespace(DataType=data_type), ops=SimpleNamespace(pack_weight=pack_weight),
    )  # fmt: skip
    module(monkeypatch, "humming.schema", HummingWeightSchema=SimpleNamespace)
    module(monkeypatch, "humming.transform", prepare_and_transform_humming_tensors=prepare)
    module(monkeypatch, "humming.forward", humming_forward=forward)
    return behaviour


BACKENDS = {"gemlite": CudaGemlite, "humming": CudaHumming}


@pytest.mark.parametrize("package", BACKENDS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_package_is_given_the_weights(
    package: str, group: int, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(package)
    backend, quantized = BACKENDS[package](), weight(group=group)
    packed = backend.pack(quantized, CPU, F16)
    assert not any(isinstance(tensor, torch.nn.Parameter) for tensor in packed.values())
    x = torch.randn(3, 128).half()
    exact = x.double() @ quantized.dequantize(torch.float64).T
    got = backend.matmul(x, packed, Shape.of(quantized))
    assert (got.double() - exact).abs().max() < 2e-3 * exact.abs().max()


def fail(_: Tensor) -> Tensor:
    raise RuntimeError("no suitable CUDA 13 environment")


@pytest.mark.parametrize("package", BACKENDS)
@pytest.mark.parametrize(("change", "reason"), [
    (lambda y: y.flip(-1), "disagrees"), (lambda y: y * 1.05, "disagrees"),
    (lambda y: y * torch.nan, "disagrees"), (lambda y: y if len(y) < 16 else -y, "disagrees"),
    (fail, "RuntimeError: no suitable CUDA 13"),
])  # fmt: skip
def test_a_package_that_is_wrong_or_fails_loses_the_layer(
    package: str, change: Any, reason: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(package).change = change
    with pytest.raises(BackendMismatch, match=reason):
        BACKENDS[package]().pack(weight(), CPU, F16)


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_what_a_package_cannot_do_is_known_before(
    backend: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = backend()
    shape = Shape(64, 128, 32)
    assert "on a GPU only" in asked.unsupported(shape, CPU, F16)
    assert "on a GPU only" in asked.unsupported(shape, CUDA, torch.float32)
    monkeypatch.setattr(f"{backend.__module__}.find_spec", lambda _: None)
    assert "is not installed" in asked.unsupported(shape, CUDA, F16)
    monkeypatch.setattr(f"{backend.__module__}.find_spec", lambda _: object())
    assert asked.unsupported(shape, CUDA, F16) is None
    assert "no multiple of" in asked.unsupported(Shape(64, 80, 16), CUDA, F16)


def test_lack_of_memory_is_no_mismatch() -> None:
    with pytest.raises(torch.OutOfMemoryError), failures_as_mismatch("a package"):
        raise torch.OutOfMemoryError("full")


def test_a_product_is_checked_for_every_number_of_rows() -> None:
    rows = []

    class Watched(CudaGemlite):
        def matmul(self, x: Tensor, packed: Any, shape: Shape) -> Tensor:
            rows.append(x.shape[0])
            return x @ packed["wide"].T

    quantized = weight()
    packed = {"wide": quantized.dequantize(F16)}
    check_product(Watched(), packed, quantized, CPU, F16, (1, 7))
    assert rows == [1, 7]
