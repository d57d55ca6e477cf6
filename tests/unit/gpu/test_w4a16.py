"""Our 4-bit kernels for GPUs: packing, plans, the interpreter's results, what the compiler makes of
them, and, where there is a GPU, the products themselves."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.awq import QuantizedWeight, W4A16Linear, quantize_rtn, warm_up_linears
from models.awq.backends import CHOICE
from models.gpu import w4a16
from models.gpu.w4a16 import Grouping, Plan

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INTERPRETED = Path(__file__).with_name("w4a16_interpreted.py")
REPOSITORY = Path(__file__).parents[3]
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


# ---- in the interpreter ---------------------------------------------------------------------


@needs_triton
def test_the_kernels_compute_the_product_in_tritons_interpreter() -> None:
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of this triton does not work with this numpy")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(INTERPRETED)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout


# ---- compiled -------------------------------------------------------------------------------

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may have, by compute capability."""
ALIGNED = [["tt.divisibility", 16]]


class Compiled:
    """A kernel for one compute capability, by triton's own ptxas."""

    def __init__(
        self, name: str, capability: int, dtype: str, warps: int, **constants: Any
    ) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module("models.gpu.w4a16_kernels"), name)
        pointers = {
            "x_ptr": dtype, "y_ptr": dtype, "out_ptr": dtype, "weight_ptr": "i32",
            "scale_ptr": "fp16", "zero_ptr": "u8", "partial_ptr": "fp32", "count_ptr": "i32",
        }  # fmt: skip
        signature = dict.fromkeys(kernel.arg_names, "i32")
        signature |= {n: f"*{kind}" for n, kind in pointers.items() if n in signature}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = [n for n in (*pointers, "n", "k", "words") if n in signature]
        source = ASTSource(
            fn=kernel, signature=signature,
            constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
            attrs={(kernel.arg_names.index(n),): ALIGNED for n in aligned},
        )  # fmt: skip
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
        )
        self.shared_memory = compiled.metadata.shared
        self.ptx: str = compiled.asm["ptx"]
        self.spilled = _local_memory(compiled.asm["cubin"])


@functools.lru_cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _local_memory(cubin: bytes) -> int:
    """Bytes for each thread, of registers that there was no room for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:\d+ STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    return int(found[1])


def _constants(plan: Plan, parts: int = 1, *, even: bool = True) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "PARTS": parts, "BLOCK_N": plan.block_n, "SPLIT": plan.split_k > 1, "EVEN_K": even,
        "STAGES": plan.stages, "chunks_per_group": 1,  # as triton makes of an argument that is 1
    }  # fmt: skip
    if plan.kernel == "gemv":
        return {**constants, "BLOCK_WORDS": 128 * plan.warps}
    return {**constants, "BLOCK_M": plan.block_m}


@needs_triton
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("plan", "dtype", "parts"), [
    (Plan("gemv", 1, 8, 1, 4), "fp16", 1), (Plan("gemv", 1, 4, 2, 2), "bf16", 1),
    (Plan("gemv", 1, 8, 1, 1, 2), "fp16", 1), (Plan("gemv", 1, 8, 1, 1), "fp16", 4),
    (Plan("gemm", 16, 128, 4, 4, 3), "bf16", 1), (Plan("gemm", 16, 64, 1, 4, 4), "fp16", 2),
    (Plan("gemm", 128, 128, 1, 8, 3), "fp16", 1),
])  # fmt: skip
def test_kernels_compile_within_a_gpus_memory_and_registers(
    plan: Plan, dtype: str, parts: int, capability: int
) -> None:
    compiled = Compiled(plan.kernel, capability, dtype, plan.warps, **_constants(plan, parts))
    assert compiled.shared_memory <= SHARED_MEMORY[capability]
    assert compiled.spilled <= (0 if plan.kernel == "gemv" else 16)
    assert "mma" in compiled.ptx or plan.kernel == "gemv"


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_for_one_row_reads_128_bits_at_a_time_and_keeps_denormals(
    capability: int,
) -> None:
    plan = Plan("gemv", 1, 8, 1, 4)
    compiled = Compiled("gemv", capability, "fp16", 4, **_constants(plan))
    assert compiled.ptx.count("ld.global.v4.b32") == plan.block_n, "a load for each output"
    assert "ld.global.b32" not in compiled.ptx
    assert ".ftz" not in compiled.ptx
    loop = compiled.ptx[: compiled.ptx.index("shfl")]
    assert "st.shared" not in loop and "bar.sync" not in loop, "nothing is exchanged on the way"


@needs_triton
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_last_program_of_a_shared_sum_sees_what_the_others_stored(capability: int) -> None:
    """Stores, a barrier, one thread's count that releases and acquires, a barrier, loads that pass
    by the first cache."""
    plan = Plan("gemv", 1, 8, 2, 2)
    ptx = Compiled("gemv", capability, "fp16", 2, **_constants(plan)).ptx
    stored = ptx.index("st.global")
    counted = ptx.index("atom.global.gpu.acq_rel.add")
    loaded = ptx.index("ld.global.cg")
    assert stored < counted < loaded
    assert "bar.sync" in ptx[stored:counted] and "bar.sync" in ptx[counted:loaded]


@needs_triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dequantising_compiles(dtype: str) -> None:
    compiled = Compiled(
        "dequantize", 80, dtype, 4, PARTS=1, BLOCK_N=4, BLOCK_WORDS=128, chunks_per_group=1
    )
    assert compiled.spilled == 0 and "ld.global.v4.b32" in compiled.ptx


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
