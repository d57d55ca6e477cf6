"""Others' kernels for the same 4-bit layers, where they have been built or installed aside.

llm-awq's own are run, on its own format, and checked before they are timed. Of the others it is
said which are there: those that can do these layers are measured by `benchmarks.gpu_linears`, and
the engines among them cannot load these checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

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
            return {SKIPPED: f"{LLM_AWQ} is not there; see docs/gpu.md for how to build it aside"}
        kernels = import_module(LLM_AWQ)
        watch, times = Stopwatch(self.setting.device), dict.fromkeys(ROWS, 0.0)
        worst = 0.0
        for name, (n, k) in LAYERS.items():
            weight = RandomWeights(0, GROUP_SIZE).quantized(name, n, k)
            tensors = {
                key: value.to(self.setting.device)
                for key, value in pack(weight, torch.float16).items()
            }
            exact = weight.dequantize(torch.float16).to(self.setting.device).float()
            for rows in ROWS:
                x = torch.randn(rows, k, device=self.setting.device).half()
                worst = max(worst, _error(_product(kernels, x, tensors, weight), x, exact))
                seconds = watch.best(
                    lambda x=x, tensors=tensors, weight=weight: _product(
                        kernels, x, tensors, weight
                    )
                )
                times[rows] += seconds * 1e3 * LAYERS_OF_7B
        if not worst <= TOLERANCE:
            raise AssertionError(f"its products are off by {worst:.3g} of the largest output")
        return {"ms": {str(rows): own for rows, own in times.items()}, "largest error": worst}


def _installed() -> Figures:
    there, absent = [], []
    for module, package in {LLM_AWQ: LLM_AWQ, **OTHERS}.items():
        if find_spec(module) is None:
            absent.append(package)
        else:
            there.append(f"{package} {version_of(package) or '(no version)'}")
    return {"there": there, "not there": absent}


def _product(
    kernels: object, x: Tensor, tensors: Mapping[str, Tensor], weight: QuantizedWeight
) -> Tensor:
    """As llm-awq's WQLinear chooses."""
    qweight, scales, zeros = (tensors[key] for key in ("qweight", "scales", "scaled_zeros"))
    if len(x) < GEMV_ROWS:
        return kernels.gemv_forward_cuda_new(  # type: ignore[attr-defined]
            x, qweight, scales, zeros, len(x), weight.out_features, weight.in_features,
            weight.group_size,
        )  # fmt: skip
    return kernels.gemm_forward_cuda_new(x, qweight, scales, zeros)  # type: ignore[attr-defined]


def _error(got: Tensor, x: Tensor, exact: Tensor) -> float:
    wanted = x.float() @ exact.t()
    return ((got.float() - wanted).abs().max() / wanted.abs().max()).item()
