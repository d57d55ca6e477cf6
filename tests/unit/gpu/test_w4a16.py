"""Our 4-bit kernels for GPUs: packing, plans, what the compiler makes of them, and what only a GPU
can show. Their products are in `test_w4a16_products.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, quantize_rtn, warm_up_linears
from models.awq.backends import CHOICE
from models.gpu import w4a16
from models.gpu.w4a16 import Grouping, Plan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
REAL_LAYERS = [
    (7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912),  # VILA1.5-3B
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008),  # LLaVA-1.5-7B
    (15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824),  # LLaVA-1.5-13B
]  # fmt: skip
"""(N, K)."""


# ---- packing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), [
    (8, 128, 128), (5, 96, 32), (3, 192, 64), (7, 640, 128), (4, 200, 200), (2, 16, 16),
])  # fmt: skip
def test_packing_is_undone(n: int, k: int, group: int) -> None:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    ones = torch.ones(n, k // group)
    packed = w4a16.pack(q, ones.half(), ones.byte(), group)
    assert packed.words.shape == (n, 16 * -(-k // 128)) and packed.words.dtype == torch.int32
    assert torch.equal(w4a16.unpack(packed.words, k), q)


def test_a_word_holds_every_sixteenth_input() -> None:
    q = torch.arange(256, dtype=torch.int64).mul(7).remainder(16).byte().view(1, 256)
    packed = w4a16.pack(q, torch.ones(1, 2), torch.ones(1, 2).byte(), 128)
    for chunk in range(2):
        for word in range(16):
            value = int(packed.words[0, chunk * 16 + word]) & 0xFFFFFFFF
            for nibble in range(8):
                assert value >> 4 * nibble & 15 == q[0, chunk * 128 + nibble * 16 + word]


@pytest.mark.parametrize(("k", "group", "expected"), [
    (4096, 128, Grouping(32, 1, 1)), (4096, 32, Grouping(32, 4, 1)), (96, 32, Grouping(1, 4, 1)),
    (512, 256, Grouping(4, 1, 2)), (4096, 4096, Grouping(32, 1, 32)), (200, 200, Grouping(2, 1, 2)),
    (64, 64, Grouping(1, 2, 1)), (192, 96, None), (96, 48, None), (128, 8, None),
])  # fmt: skip
def test_groups_lie_in_chunks_or_chunks_in_groups(
    k: int, group: int, expected: Grouping | None
) -> None:
    assert Grouping.of(k, group) == expected


# ---- plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("processors", [16, 108, 132])
@pytest.mark.parametrize(("n", "k"), [*REAL_LAYERS, (64, 128), (16, 96)])
def test_plans_are_for_their_number_of_rows_and_can_be_written_down(
    n: int, k: int, processors: int, thorough: bool
) -> None:
    for rows in (1, 2, 16, 17, 64, 128, 129, 4096):
        plans = w4a16.plans(rows, n, k, processors, thorough=thorough)
        assert len(plans) == len(set(plans)) >= 1
        assert thorough or len(plans) <= 6, "each is compiled and timed at a start"
        for plan in plans:
            assert Plan.parse(str(plan)) == plan
            assert (plan.kernel == "gemv") == (rows == 1)
            assert plan.split_k <= max(1, k // 128)
            assert plan.split_k == 1 or plan.split_k * rows * n <= w4a16.PARTIAL_SUMS
        assert plans[0].kernel == ("gemv" if rows == 1 else "gemm" if rows <= 128 else "dense")


@pytest.mark.parametrize("text", [
    "", "gemv", "dense 1x1", "gemm 16x64 split1 warps4", "gemm 16x64 split3 warps4 stages2",
    "gemm ax64 split1 warps4 stages2", "gemm 16 split1 warps4 stages2",
    "gemm 0x64 split1 warps4 stages1",
])  # fmt: skip
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Plan.parse(text)


# ---- compiled -------------------------------------------------------------------------------


@pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
def test_the_kernels_compile_to_what_was_meant(tmp_path: Path) -> None:
    """In a process of its own, whose triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    checks = Path(__file__).with_name("w4a16_compiled.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(checks)],
        cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout


# ---- on a GPU -------------------------------------------------------------------------------


def _layer(
    n: int, k: int, group: int, dtype: torch.dtype, backend: str = "cuda_triton"
) -> tuple[W4A16Linear, QuantizedWeight]:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_rtn((torch.randn(n, k, generator=generator) / k**0.5).half(), group)
    layer = W4A16Linear.from_quantized(
        weight, None, backend=backend, device=torch.device("cuda", 0), dtype=dtype
    )
    return layer, weight


def _assert_right(got: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    exact = x.double().cpu() @ weight.dequantize(torch.float64).T
    error = 0.02 if got.dtype == torch.bfloat16 else 0.003
    assert (got.double().cpu() - exact).abs().max() < error * exact.abs().max()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 129, 300])
def test_every_plan_is_right_on_a_gpu(rows: int, group: int, dtype: torch.dtype) -> None:
    layer, weight = _layer(1000, 1280, group, dtype)
    assert layer.backend == "cuda_triton"
    x = torch.randn(rows, 1280, device="cuda", dtype=dtype)
    packed = {name.removeprefix("packed_"): b for name, b in layer.named_buffers() if "_" in name}
    for plan in w4a16.plans(rows, 1000, 1280, 132, thorough=True):
        got = w4a16.matmul(x, w4a16.Weights(**packed), 1280, group, plan)
        _assert_right(got, x, weight)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_shared_sum_has_the_same_bits_every_time_on_a_gpu(rows: int) -> None:
    layer, _ = _layer(512, 4096, 128, torch.float16)
    packed = {name.removeprefix("packed_"): b for name, b in layer.named_buffers() if "_" in name}
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.float16)
    plan = Plan("gemv", 1, 4, 4, 1) if rows == 1 else Plan("gemm", 16, 64, 8, 4, 3)
    first, *others = (
        w4a16.matmul(x, w4a16.Weights(**packed), 4096, 128, plan).clone() for _ in range(200)
    )
    assert all(torch.equal(first, other) for other in others)
    assert not packed["counts"].any()


@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_a_warm_layer_can_be_captured_in_a_graph(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TINYCHAT_W4A16_SECONDS", "20")
    monkeypatch.setattr("models.awq.backends.cuda._choosers", {})
    layer, weight = _layer(512, 1024, 128, torch.float16, CHOICE)
    warm_up_linears(layer, torch.float16, 64)
    x = torch.zeros(rows, 1024, device="cuda", dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        _assert_right(y, x, weight)
