"""What it was measured on, and what else was running there. No names of machines."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Those that torch's products use."""
PACKAGES = ("torch", "transformers", "triton", "ray", "uvicorn")


def describe_machine() -> dict[str, Any]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "python": platform.python_version(),
        **{name: own for name in PACKAGES if (own := version_of(name)) is not None},
    }


def describe_gpu() -> dict[str, Any]:
    """The first one's kind and size; nothing where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
