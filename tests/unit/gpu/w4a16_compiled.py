"""What the compiler makes of the W4A16 kernels, for GPUs that need not be there. Run by
`test_w4a16.py` in a process of its own, whose triton does not interpret."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.gpu.w4a16 import Plan

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may have, by compute capability."""
ALIGNED = [["tt.divisibility", 16]]


class Compiled:
    """A kernel for one compute capability, by triton's own ptxas."""

    def __init__(
        self, name: str, capability: int, dtype: str, warps: int, **constants: Any
    ) -> None:
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


@pytest.mark.parametrize(("plan", "dtype", "parts", "capability"), [
    (plan, dtype, parts, capability)
    for plan, dtype, parts in [
        (Plan("gemv", 1, 8, 1, 4), "bf16", 1), (Plan("gemv", 1, 8, 1, 1, 2), "fp16", 1),
        (Plan("gemv", 1, 8, 2, 1), "fp16", 4), (Plan("gemm", 16, 128, 4, 4, 3), "bf16", 1),
        (Plan("gemm", 16, 64, 1, 4, 4), "fp16", 2), (Plan("gemm", 128, 128, 1, 8, 3), "fp16", 1),
    ]
    for capability in SHARED_MEMORY
    if capability != 89 or plan.kernel == "gemm"  # it differs by the memory that gemv has no use of
])  # fmt: skip
def test_kernels_compile_within_a_gpus_memory_and_registers(
    plan: Plan, dtype: str, parts: int, capability: int
) -> None:
    compiled = Compiled(plan.kernel, capability, dtype, plan.warps, **_constants(plan, parts))
    assert compiled.shared_memory <= SHARED_MEMORY[capability]
    assert compiled.spilled <= (0 if plan.kernel == "gemv" else 16)
    assert "mma" in compiled.ptx or plan.kernel == "gemv"


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


@pytest.mark.parametrize("capability", [80, 90])
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


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dequantising_compiles(dtype: str) -> None:
    compiled = Compiled(
        "dequantize", 80, dtype, 4, PARTS=1, BLOCK_N=4, BLOCK_WORDS=128, chunks_per_group=1
    )
    assert compiled.spilled == 0 and "ld.global.v4.b32" in compiled.ptx
