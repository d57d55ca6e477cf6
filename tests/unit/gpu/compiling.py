"""Compiles the kernels as they are launched, for GPUs that need not be there.

    python -m tests.unit.gpu.compiling 80 89 90 [--all]

prints one line of JSON for each kernel. Runs in a process of its own: triton must not have been
imported with its interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from models.gpu import activation, decode_attention, norm, prefill_attention, rotary

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
}  # fmt: skip
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
OPTIONS = ("num_warps", "num_stages")


def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def launch_attention(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    qkv = empty(9, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, out = qkv[:, :heads], empty(9, heads, head_dim, dtype=dtype)
    cache = empty(100, kv_heads, 16, head_dim, dtype=dtype)
    tables, lengths = empty(9, 30), empty(9)
    for splits in (1, 5):
        decode_attention.decode_attention(q, cache, cache, tables, lengths, splits, out)
    prefill_attention.prefill_attention(q, cache, cache, tables, lengths, empty(3), 5, 0, out)
    cos = empty(9, 1, head_dim, dtype=dtype)
    rotary.rotate_and_store(qkv, cos, cos, lengths, cache, cache)


def launch_others(dtype: torch.dtype, hidden: int, inner: int) -> None:
    x, weight = empty(9, hidden, dtype=dtype), empty(hidden, dtype=dtype)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)
    activation.swiglu(empty(9, 2 * inner, dtype=dtype))


def recorded(launch: Callable[[], None]) -> list[tuple[JITFunction, dict[str, Any]]]:
    """The kernels that `launch` would start, with their arguments and options by name."""
    calls = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        calls.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named}))

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    finally:
        JITFunction.run = original
    return calls


def compiled(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> dict[str, Any]:
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            # What is not would be compiled again for some values, in the middle of serving.
            assert isinstance(value, float) or parameter.do_not_specialize, name
    source = ASTSource(kernel, signature, constants, aligned)
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.asm["ptx"])
        file.flush()
        target = f"sm_{capability}" + ("a" if capability >= 90 else "")
        said = subprocess.run(
            [PTXAS, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    (registers,), (spilled,) = (
        re.findall(r"Used (\d+)", said),
        re.findall(r"(\d+) bytes spill s", said),
    )
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "dtype": next(iter(signature.values())),
        "constants": {kernel.arg_names[i]: value for (i,), value in constants.items()},
        "shared": result.metadata.shared,
        "registers": int(registers),
        "spilled": int(spilled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    attention = [(half, 32, 32, 128)]  # LLaVA-1.5-7B
    others = [(half, 4096, 11008)]
    if args.all:
        groups = [(32, 32), (20, 20), (32, 8), (28, 4), (14, 2)]
        attention = [(brain, *group, 128) for group in groups]
        attention += [(t, 28, 4, dim) for t in (half, full) for dim in (16, 64, 80, 96, 128, 256)]
        others = [(t, size, 2 * size) for t in (half, brain, full) for size in (64, 2560, 8192)]
    calls = recorded(
        lambda: (
            [launch_attention(*shape) for shape in attention],
            [launch_others(*shape) for shape in others],
        )
    )
    for capability in args.capabilities:
        for kernel, arguments in calls:
            print(json.dumps(compiled(kernel, arguments, capability)), flush=True)


if __name__ == "__main__":
    main()
