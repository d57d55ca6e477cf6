"""How much memory loading takes besides the model: no tensor is ever held twice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models.checkpoints.synthesis import FAMILIES, synthesize, tiny

PROGRAM = """
import sys
from pathlib import Path
from models.loading import load_core

def in_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

small, folder, precision = sys.argv[1:]
options = {"device": "cpu", "kv_cache_bytes": 1 << 20, "bf16_copy": False, "num_threads": 1}
load_core(small, precision=precision, **options)
Path("/proc/self/clear_refs").write_text("5")
before = in_bytes("VmRSS")
core = load_core(folder, precision=precision, **options)
print(in_bytes("VmHWM") - before)
"""
"""Prints by how much loading raises the process's memory at most, after the libraries are warm."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("16bit", "W16A16"), ("llm-awq-v2", "W4A16"), ("llm-awq-v1", "W4A16"),
        ("autoawq", "W4A16"), ("compressed-tensors", "W4A16"),
    ],
)  # fmt: skip
def test_loading_takes_little_more_than_the_weights(
    name: str, precision: str, tmp_path: Path
) -> None:
    """The embeddings are two fifths of these weights, so that a second copy of them would show."""
    family = tiny(FAMILIES["vila1.5-3b"])
    language = replace(family.language, hidden=2048, intermediate=4096, layers=2, heads=16)
    language = replace(language, kv_heads=16)
    large = replace(family, name="large", language=language, vocabulary=8000)
    synthesize(family, tmp_path / "small", scale="full", formats=[name])
    synthesize(large, tmp_path / "large", scale="full", formats=[name])
    files = [*(tmp_path / "large").rglob("*.pt"), *(tmp_path / "large").rglob("*.safetensors")]
    weights = sum(path.stat().st_size for path in files)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "small", tmp_path / "large", precision],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 1.3 * weights
