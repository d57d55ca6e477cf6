"""Our own kernel for CPUs: exact where nothing needs rounding, and never less than torch's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, quantize_rtn, select_backend
from models.native import kernels

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    kernels() is None, reason="no AVX-512 with bf16, or no C++ compiler"
)
SHAPES = [(64, 128, 32), (128, 256, 64), (200, 512, 128), (40, 256, 256), (1, 32, 32), (65, 96, 96)]
"""(N, K, G): whole blocks of 64 outputs, remainders, one group and many."""


def product(weight: QuantizedWeight, x: Tensor, backend: str = "cpu_native") -> Tensor:
    layer = W4A16Linear.from_quantized(
        weight, None, backend=backend, device=CPU, dtype=torch.bfloat16
    )
    assert layer.backend == backend
    return layer(x)


def random_weight(
    n: int, k: int, group: int, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n)
    return quantize_rtn((torch.randn(n, k, generator=generator) / k**0.5).to(dtype), group)


def inputs(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()


def exact(weight: QuantizedWeight, x: Tensor) -> Tensor:
    return x.double() @ weight.dequantize(torch.float64).T


@needs_kernels
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
def test_small_integers_are_multiplied_exactly(n: int, k: int, group: int, rows: int) -> None:
    """Every sum fits fp32, so that only the last rounding, to bf16, is left."""
    generator = torch.Generator().manual_seed(n)
    groups = (n, k // group)
    weight = QuantizedWeight(
        torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
        2.0 ** torch.randint(-6, 3, groups, generator=generator),
        torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8),
        group,
    )
    x = torch.randint(-16, 17, (rows, k), generator=generator).bfloat16()
    assert torch.equal(product(weight, x), exact(weight, x).bfloat16())


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 4, 13])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 2048, 128), (48, 512, 32)])
def test_errors_are_the_last_roundings_and_below_those_of_torchs_product(
    n: int, k: int, group: int, rows: int, scales: torch.dtype
) -> None:
    weight, x = random_weight(n, k, group, scales), inputs(rows, k)
    wanted = exact(weight, x)
    ours = (product(weight, x).double() - wanted).abs()
    torchs = (product(weight, x, "cpu_int4").double() - wanted).abs()
    # Half a unit of bf16's last place, the result's own, and a little for the sums in fp32.
    assert (ours <= wanted.abs() * 2**-8 + 1e-3 * wanted.abs().max()).all()
    assert ours.square().mean() <= torchs.square().mean()


@needs_kernels
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_scales_beyond_fp16_keep_their_precision(factor: float) -> None:
    weight = random_weight(64, 128, 32, torch.float32)
    scaled = QuantizedWeight(weight.q, weight.scale * factor, weight.zero, 32)
    x = inputs(2, 128)
    wanted = exact(scaled, x)
    assert (product(scaled, x).double() - wanted).abs().max() < 0.004 * wanted.abs().max()


@needs_kernels
def test_weights_that_are_all_zero_are_no_special_case() -> None:
    weight = QuantizedWeight(
        torch.full((64, 64), 8, dtype=torch.uint8), torch.zeros(64, 2),
        torch.full((64, 2), 8, dtype=torch.uint8), 32,
    )  # fmt: skip
    assert torch.equal(product(weight, inputs(3, 64)), torch.zeros(3, 64).bfloat16())


@needs_kernels
@pytest.mark.parametrize("rows", [2, 4, 7, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(rows: int, threads: int) -> None:
    weight, x = random_weight(200, 512, 128), inputs(rows, 512)
    alone = torch.cat([product(weight, x[row : row + 1]) for row in range(rows)])
    torch.set_num_threads(threads)
    assert torch.equal(product(weight, x), alone)


@needs_kernels
def test_rows_may_be_none_or_not_contiguous() -> None:
    weight, x = random_weight(72, 128, 64), inputs(6, 256)
    assert product(weight, x[:0, :128]).shape == (0, 72)
    assert torch.equal(product(weight, x[::2, 128:]), product(weight, x[::2, 128:].contiguous()))


# ---- without it -----------------------------------------------------------------------------


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no memory of the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.cache_clear()
    yield tmp_path / "tinychat-serve" / "native"
    kernels.cache_clear()


@needs_kernels
def test_without_a_compiler_torchs_product_answers_and_one_line_says_why(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x = random_weight(64, 512, 128), inputs(3, 512)
    assert select_backend(CPU, torch.bfloat16) == "cpu_native"
    ours = product(weight, x)
    kernels.cache_clear()
    for library in anew.glob("*.so"):
        library.unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        chosen = [select_backend(CPU, torch.bfloat16) for _ in range(3)]
    assert chosen == ["cpu_int4"] * 3
    assert select_backend(CPU, torch.bfloat16, bf16_copy=True) == "cpu_int4_bf16"
    (record,) = caplog.records
    assert "there is no C++ compiler" in record.getMessage()
    fallback = product(weight, x, "cpu_int4")
    assert (fallback.float() - ours.float()).abs().max() < 0.02 * ours.float().abs().max()


@needs_kernels
def test_a_library_once_built_needs_no_compiler(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels() is not None
    kernels.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert kernels() is not None


@needs_kernels
@pytest.mark.parametrize(
    ("compiler", "reason"), [("false", "false failed: status 1"), ("true", "No such file")]
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(
    anew: Path, compiler: str, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", compiler)
    assert kernels() is None
    assert reason in caplog.text
    assert [path.name for path in anew.iterdir()] == ["lock"]


@needs_kernels
def test_a_library_that_others_could_have_written_is_not_loaded(
    anew: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels() is not None
    assert anew.stat().st_mode & 0o777 == 0o700
    (library,) = anew.glob("*.so")
    for path in (library, anew):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        kernels.cache_clear()
        caplog.clear()
        assert kernels() is None
        assert f"{path} must belong to this user" in caplog.text
        path.chmod(mode)
    moved = library.rename(anew / "elsewhere.so")
    library.symlink_to(moved)
    kernels.cache_clear()
    assert kernels() is None


def test_a_variable_turns_it_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_NATIVE", "0")
    assert select_backend(CPU, torch.bfloat16) == "cpu_int4"
    assert not anew.exists()


def test_a_cpu_without_the_instructions_is_told_apart(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("models.native.library._cpu_flags", lambda: {"avx2", "f16c", "bmi2"})
    with caplog.at_level(logging.INFO):
        assert select_backend(CPU, torch.bfloat16) == "cpu_int4"
    assert "this CPU has no avx512_bf16" in caplog.text and not anew.exists()
