"""What it was measured on, and what else was running there. No names of machines."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Those that torch's products use."""
PACKAGES = ("torch", "transformers", "ray", "uvicorn")


def describe_machine() -> dict[str, Any]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def busy_cpus(seconds: float = 2.0) -> float:
    """How many CPUs are busy now, whatever with. Asked while nothing is measured, it tells how
    much else there is on the machine."""
    before = _ticks()
    time.sleep(seconds)
    busy, total = (after - then for after, then in zip(_ticks(), before, strict=True))
    return round(busy / total * (os.cpu_count() or 1), 2) if total else 0.0


def _ticks() -> tuple[int, int]:
    """(busy, all), of all CPUs since the start."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)
