"""The whole application on this machine: HTTP against the bare engine, by `serve run`.

Both hold the model at once and are asked in turns, so each is given a KV cache of its own size
instead of a share of the device. Needs Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from benchmarks.comparison import Plan, run
from benchmarks.engine import engine_arm
from benchmarks.goals import ENGINE, HTTP, Goal
from benchmarks.gpu_models import checkpoint
from benchmarks.gpu_parts import Case, Figures, Part
from benchmarks.http_arm import HttpArm
from benchmarks.report import COLUMNS
from benchmarks.worker import Worker
from models.demo import DEMO_CHECKPOINT

WAY = "serve run"
MODEL = "llava-v1.5-7b"
LEAST = 0.95
"""Of the engine's tokens per second."""


class ApplicationPart(Part):
    name = "application"
    packages = ("ray", "fastapi", "aiohttp", "yaml")
    seconds = 200.0

    def cases(self) -> Mapping[str, Case]:
        return {f"HTTP and engine, {self._model}": self._compare}

    @property
    def _model(self) -> str:
        return MODEL if self.setting.scale == "full" else "demo"

    def goals(self, cases: Mapping[str, Figures]) -> Iterator[Goal]:
        for figures in cases.values():
            for streams, ratio in figures["ratios"].items():
                yield Goal(
                    f"{self._model}, {streams} stream(s), HTTP / engine, tokens/s", ratio, LEAST,
                    least=True,
                )  # fmt: skip

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        yield "| streams | arm | tokens/s | first token, ms | per token, ms | waited, p99, ms |"
        yield "|---:|---|---:|---:|---:|---:|"
        for figures in cases.values():
            for arm, by_streams in figures["medians"].items():
                for streams, own in by_streams.items():
                    cells = " | ".join(f"{f * own[name]:.1f}" for name, f in COLUMNS.items())
                    yield f"| {streams} | {arm} | {cells} |"

    def _compare(self) -> Figures:
        full = self.setting.scale == "full"
        plan = Plan((1, 8, 32), 128, 3) if full else Plan((1, 4), 24, 2)
        folder = checkpoint(self.setting, MODEL) if full else DEMO_CHECKPOINT
        most = max(plan.streams)
        options = {
            "device": self.setting.kind,
            "kv_cache_bytes": (16 << 30) if full else (64 << 20),
            "max_num_seqs": most,
        }
        worker = Worker(WAY, str(folder), most, options)
        arms = [engine_arm(str(folder), most, options), HttpArm(HTTP[WAY], worker)]
        results = asyncio.run(run(arms, plan))
        ratios = {str(n): results.ratio(HTTP[WAY], ENGINE, n) for n in plan.streams}
        return {"ratios": ratios, **results.as_json()}
