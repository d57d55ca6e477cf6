"""Others' kernels for the same 4-bit layers, where they have been built or installed aside.

llm-awq's own are run, on its own format, and checked before they are timed. Of the others it is
said which are there: those that can do these layers are measured by `benchmarks.gpu_linears`, and
the engines among them cannot load these checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_models import GROUP_SIZE
from benchmarks.gpu_parts import SKIPPED, Case, Figures, Part
from benchmarks.machine import version_of
from benchmarks.stopwatch import Stopwatch
from models.awq.formats.llm_awq_v2 import pack
from models.awq.quantized_weight import QuantizedWeight
from models.checkpoints.synthesis.weights import RandomWeights

LLM_AWQ = "awq_inference_engine"
"""The module that llm-awq's awq/kernels builds."""
OTHERS = {
    "gemlite": "gemlite", "humming": "humming-kernels", "flashinfer": "flashinfer-python",
    "flash_attn": "flash-attn", "torchao": "torchao", "vllm": "vllm", "lmdeploy": "lmdeploy",
    "sglang": "sglang", "exllamav2": "exllamav2",
}  # fmt: skip
"""Module -> package."""
LAYERS = {
    "qkv": (12288, 4096), "o": (4096, 4096), "gate-up": (22016, 4096), "down": (4096, 11008),
}  # fmt: skip
"""(N, K) of a 7B."""
ROWS = (1, 2, 4, 7, 8, 16, 64, 640)
GEMV_ROWS = 8
"""From here on llm-awq takes its other kernel."""
LAYERS_OF_7B = 32
TOLERANCE = 0.01


class PeersPart(Part):
    name = "peers"
    seconds = 40.0

    def cases(self) -> Mapping[str, Case]:
        return {"installed": _installed, "llm-awq's kernels": self._llm_awq}

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        if "installed" in cases:
            yield "- there: " + (", ".join(cases["installed"]["there"]) or "none")
            yield "- not there: " + (", ".join(cases["installed"]["not there"]) or "none")
        own = cases.get("llm-awq's kernels")
        if own is not None:
            yield "- llm-awq's kernels, ms for the layers of a 7B: " + ", ".join(
                f"{rows} rows {milliseconds:.3f}" for rows, milliseconds in own["ms"].items()
            )

    def _llm_awq(self) -> Figures:
        if not self.setting.is_gpu:
            return {SKIPPED: "its kernels need a GPU"}
        if find_spec(LLM_AWQ) is None:
            return {SKIPPED: f"{LLM_AWQ} is not there; docs/gpu.md says how to build it aside"}
        return measure_llm_awq(import_module(LLM_AWQ), self.setting.device)


def measure_llm_awq(kernels: Any, device: torch.device) -> Figures:
    """Milliseconds for all layers of a 7B, by the number of rows.

    Args:
        kernels: the module, or what has its two functions.

    Raises:
        AssertionError: they compute something else than the weights say.
    """
    watch, times, worst = Stopwatch(device), dict.fromkeys(ROWS, 0.0), 0.0
    for name, (n, k) in LAYERS.items():
        weight = RandomWeights(0, GROUP_SIZE).quantized(name, n, k)
        packed = {key: value.to(device) for key, value in pack(weight, torch.float16).items()}
        exact = weight.dequantize(torch.float16).to(device).float()
        for rows in ROWS:
            x = torch.randn(rows, k, device=device).half()
            run = partial(llm_awq_product, kernels, x, packed, weight)
            wanted = x.float() @ exact.t()
            error = (run().float() - wanted).abs().max() / wanted.abs().max()
            if not error <= TOLERANCE:  # a NaN fails too
                raise AssertionError(f"{name}, {rows} rows: off by {error:.3g} of the largest")
            worst = max(worst, float(error))
            times[rows] += watch.best(run) * 1e3 * LAYERS_OF_7B
    return {"ms": {str(rows): own for rows, own in times.items()}, "largest error": worst}


def llm_awq_product(
    kernels: Any, x: Tensor, packed: Mapping[str, Tensor], weight: QuantizedWeight
) -> Tensor:
    """(M, K) fp16 -> (M, N), by the kernel that llm-awq's WQLinear chooses."""
    tensors = [packed[key] for key in ("qweight", "scales", "scaled_zeros")]
    if len(x) >= GEMV_ROWS:
        return kernels.gemm_forward_cuda_new(x, *tensors)
    sizes = (len(x), weight.out_features, weight.in_features, weight.group_size)
    return kernels.gemv_forward_cuda_new(x, *tensors, *sizes)


def _installed() -> Figures:
    there, absent = [], []
    for module, package in {LLM_AWQ: LLM_AWQ, **OTHERS}.items():
        if find_spec(module) is None:
            absent.append(package)
        else:
            there.append(f"{package} {version_of(package) or '(no version)'}")
    return {"there": there, "not there": absent}
