"""How much memory loading takes besides the model: no tensor is ever held twice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models.checkpoints.synthesis import FAMILIES, synthesize, tiny

PROGRAM = """
import os, sys
from pathlib import Path
from models.loading import load_core

def in_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

precision, *folders = sys.argv[1:]
for folder in folders:
    if os.fork() == 0:
        Path("/proc/self/clear_refs").write_text("5")
        before = in_bytes("VmRSS")
        core = load_core(
            folder, precision=precision, device="cpu", kv_cache_bytes=1 << 20, bf16_copy=False,
            num_threads=1,
        )
        print(in_bytes("VmHWM") - before, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0
"""
"""Prints for each folder by how much loading raises a process's memory at most."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("name", "precision"),
    [("16bit", "W16A16"), ("llm-awq-v2", "W4A16")],
)
def test_memory_grows_little_more_than_the_weights(
    name: str, precision: str, tmp_path: Path
) -> None:
    """Of two sizes, since what libraries take for themselves is the same for both. Embeddings and
    output layer are most of the larger one, so that a second copy of either would show."""
    family = tiny(FAMILIES["vila1.5-3b"])
    language = replace(family.language, hidden=1024, intermediate=2048)
    folders, sizes = [], []
    for vocabulary in (2000, 40_000):
        folder = tmp_path / str(vocabulary)
        synthesize(
            replace(family, language=language, vocabulary=vocabulary), folder, scale="full",
            formats=[name],
        )  # fmt: skip
        files = [*folder.rglob("*.pt"), *folder.rglob("*.safetensors")]
        folders.append(folder)
        sizes.append(sum(path.stat().st_size for path in files))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, precision, *folders],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split())
    assert large - small <= 1.3 * (sizes[1] - sizes[0])
