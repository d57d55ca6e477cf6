"""A checkpoint of real size on this machine: how long it loads, what it takes, how fast it answers.

    python -m models.checkpoints synthesize --like vila1.5-3b --scale full \\
        --format llm-awq-v2 /tmp/VILA1.5-3b
    python -m benchmarks.full_scale /tmp/VILA1.5-3b [--record NAME]

Each way runs in a process of its own, since a process's peak of memory is never lowered.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import busy_cpus
from benchmarks.report import write_figures
from benchmarks.streams import ask, noise
from models.command_line import HelpFormatter

if TYPE_CHECKING:
    from models import Engine

TOKENS = 32
STREAMS = (1, 4)
CONTEXT = 1024


@dataclass(frozen=True)
class Figures:
    """
    Attributes:
        load_s: until the engine takes requests.
        checkpoint_gb: bytes of all files with weights.
        loading_peak_gb: of the process's memory until then, less the libraries' and the KV cache.
        first_token_s: with one picture and an empty cache, one stream.
        tokens_per_s: after each first token, by the number of streams.
    """

    backend: str
    load_s: float
    checkpoint_gb: float
    loading_peak_gb: float
    first_token_s: float
    tokens_per_s: dict[str, float]


def measure(folder: Path, bf16_copy: bool) -> Figures:
    from models import load_engine

    before = time.monotonic()
    base = _peak_gb()
    with load_engine(
        folder,
        max_model_len=CONTEXT,
        max_num_seqs=max(STREAMS),
        bf16_copy=bf16_copy,
        max_prefill_slowdown=None,  # else the first stream would end before the last one begins
    ) as engine:
        load_s, peak = time.monotonic() - before, _peak_gb() - base - _kv_cache_gb(engine)
        first, speed = [], {}
        for streams in STREAMS:
            answered = asyncio.run(ask(engine, noise(streams), TOKENS))
            first += answered.first_token_s
            speed[str(streams)] = answered.tokens_per_s
        return Figures(
            engine.description()["backend"], load_s, _weights_gb(folder), peak, first[0], speed
        )


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _kv_cache_gb(engine: Engine) -> float:
    import torch

    from models.language.kv_cache import KVCacheShape

    stats = engine.stats()
    shape = KVCacheShape.of(engine.spec.language, stats.block_size, torch.bfloat16)
    return stats.blocks_total * shape.bytes_per_block / 1e9


def _weights_gb(folder: Path) -> float:
    kinds = (".pt", ".safetensors", ".bin")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in kinds) / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_scale", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint, with 4-bit weights")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    from models.native import kernels

    busy = busy_cpus()
    results = []
    # Where there are kernels of our own, a copy is not used.
    for bf16_copy in (False,) if kernels() else (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(measure, (options.folder, bf16_copy))
        results.append(figures)
        speeds = ", ".join(f"{v:.1f} with {n}" for n, v in figures.tokens_per_s.items())
        print(
            f"{figures.backend}: loaded in {figures.load_s:.1f} s, at most "
            f"{figures.loading_peak_gb:.2f} GB for {figures.checkpoint_gb:.2f} GB of files "
            f"({figures.loading_peak_gb / figures.checkpoint_gb:.2f}); first token of a picture "
            f"question {figures.first_token_s:.1f} s; tokens/s: {speeds} stream(s)",
            flush=True,
        )
    if options.record:
        write_figures(
            options.record, model=options.folder.name, busy_cpus_before=busy, context=CONTEXT,
            results=[asdict(figures) for figures in results],
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
