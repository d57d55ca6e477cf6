"""The benchmark of a GPU's linears, with the backends of CPUs and on their smallest layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_linears
from benchmarks.gpu_linears import DENSE, Limits
from models.awq.backends import BACKENDS
from models.awq.backends.base import Shape
from models.awq.backends.timings import Environment, Timings, layer_key

CPU = torch.device("cpu")


def test_every_backend_is_measured_beside_16_bits() -> None:
    found = list(
        gpu_linears.measure(
            ["small"], [1, 4], CPU, torch.float32,
            {name: BACKENDS[name] for name in ("reference", "cuda_triton")}, Limits(1e10, 1e11),
        )
    )  # fmt: skip
    assert [(p.layer, p.rows, p.backend) for p in found] == [
        (layer, rows, backend)
        for layer in ("qkv", "down") for rows in (1, 4) for backend in (DENSE, "reference")
    ]  # fmt: skip
    for product in found:
        assert product.error < 1e-4 and product.microseconds > 0
        operations = 2 * product.rows * product.out_features * product.in_features
        assert product.tflop_per_s == pytest.approx(operations / product.microseconds / 1e6)
    timings = gpu_linears.timings_of(found)
    shape = Shape(768, 256, gpu_linears.GROUP)
    assert set(timings[layer_key(shape, torch.float32)][4]) == {"reference"}


def test_the_command_writes_what_a_server_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_linears, "measure_limits", lambda *_: Limits(1e10, 1e11))
    arguments = ["--device", "cpu", "--shapes", "small", "--rows", "2", "--dtype", "bfloat16"]
    assert gpu_linears.main([*arguments, "--tuned", str(tmp_path), "--backends", "reference"]) == 0
    assert "| small down bfloat16 | reference |" in capsys.readouterr().out
    monkeypatch.setattr("models.awq.backends.timings.TUNED", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = Timings.load(Environment.of(CPU)).of(Shape(768, 256, 128), torch.bfloat16)
    assert known[2]["reference"].microseconds > 0
