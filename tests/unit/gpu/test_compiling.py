"""The kernels compile for GPUs that are not there, and fit them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.unit.gpu import device  # noqa: F401, skips where there is no triton

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that one program can have, by compute capability (CUDA programming guide)."""
KERNELS = (
    "decode_kernel", "join_kernel", "prefill_kernel", "rotate_and_store_kernel",
    "rms_norm_kernel", "swiglu_kernel",
)  # fmt: skip


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    """In a process of its own, whose triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-m", "tests.unit.gpu.compiling", *map(str, SHARED)],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[3],
    ).stdout  # fmt: skip
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {(kernel["kernel"], kernel["capability"]) for kernel in kernels} == set(
        itertools.product(KERNELS, SHARED)
    )
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[kernel["capability"]], kernel
        assert kernel["spilled"] == 0, kernel
