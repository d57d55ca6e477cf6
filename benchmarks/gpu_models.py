"""The models that are measured: checkpoints of random weights, and what is loaded of them."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import Setting
from models import Engine, load_engine
from models.checkpoints.synthesis import synthesize

MODELS = ("llava-v1.5-7b", "vila1.5-3b")
GROUP_SIZE = 128


def checkpoint(setting: Setting, family: str, formats: tuple[str, ...] = ("llm-awq-v2",)) -> Path:
    """Its folder, which is written if it is not there. At full size all layers hold the same
    weights, which changes no size and no speed, and takes a fraction of the time."""
    name = "-".join((family, setting.scale, *formats))
    folder = setting.models / name
    if not folder.exists():
        setting.models.mkdir(parents=True, exist_ok=True)
        begun = setting.models / f"begun-{name}"
        shutil.rmtree(begun, ignore_errors=True)
        started = time.monotonic()
        synthesize(
            family, begun, scale=setting.scale, formats=formats, group_size=GROUP_SIZE,
            equal_layers=setting.scale == "full",
        )  # fmt: skip
        begun.rename(folder)
        print(f"  {name} written in {time.monotonic() - started:.1f} s", flush=True)
    return folder


class LoadedEngine:
    """One engine at a time, which the cases of a part share."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._engine: Engine | None = None
        self._folder: Path | None = None
        self.load_s = 0.0

    def of(self, folder: Path, **options: Any) -> Engine:
        if self._engine is None or self._folder != folder:
            self.close()
            free_memory(self._setting)
            if self._setting.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            self._engine = load_engine(folder, device=self._setting.kind, **options)
            self.load_s = time.monotonic() - started
            self._folder = folder
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._folder = None


def free_memory(setting: Setting) -> None:
    """Gives the device what nothing refers to any more."""
    gc.collect()
    if setting.is_gpu:
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(setting: Setting) -> Iterator[dict[str, float]]:
    """Fills in, at the end, the most that tensors took, in GB; nothing on a CPU."""
    figures: dict[str, float] = {}
    if setting.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    yield figures
    if setting.is_gpu:
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
