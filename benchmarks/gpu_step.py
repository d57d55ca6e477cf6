"""Where a step of decoding goes, on the host and on the device.

The core is driven without its thread, and its parts are timed from outside. On a GPU `run` and
`sample` launch, and `fetch` waits for the tokens of the step before: there a host waits that is
ahead of its device. How busy the device is, and with which kernels, torch's profiler tells, in
steps of their own, since it slows the host down.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_limits import Limits, ModelCost
from benchmarks.gpu_models import checkpoint, free_memory
from benchmarks.gpu_parts import Case, Figures, Part, Setting
from benchmarks.report import plot_stacks
from benchmarks.streams import PROMPT, noise
from models import SamplingParams
from models.engine.core import EngineCore
from models.engine.preparation import RequestPreparer
from models.engine.sampler import SampledTokens
from models.language.paged_batch import PagedBatch
from models.loading import LoadedCore, load_core

MODEL = "llava-v1.5-7b"
KERNELS = 12
"""The most expensive ones, which are named."""
PHASES = ("schedule", "lay out", "run", "sample", "fetch", "commit")


class StepPart(Part):
    name = "step"
    seconds = 90.0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        full = setting.scale == "full"
        self._streams = (1, 8, 64) if full else (1, 4)
        self._steps = 60 if full else 12
        self._options: dict[str, Any] = {
            "max_num_seqs": max(self._streams), "max_model_len": 2048 if full else 512,
            "max_prefill_slowdown": None, "enable_prefix_caching": False,
        }  # fmt: skip
        if not setting.is_gpu:
            self._options["kv_cache_bytes"] = 64 << 20
        self._loaded: LoadedCore | None = None

    def cases(self) -> Mapping[str, Case]:
        return {
            _name(streams): lambda streams=streams: self._step(streams)
            for streams in self._streams
        }  # fmt: skip

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        yield "| streams | step, ms | " + " | ".join(PHASES) + " | rest | idle | limit, ms |"
        yield "|---:|" + "---:|" * (len(PHASES) + 4)
        for figures in cases.values():
            phases = figures["phases_ms"]
            yield (
                f"| {figures['streams']} | {figures['step_ms']:.3f} | "
                + " | ".join(f"{phases[phase]:.3f}" for phase in PHASES)
                + f" | {phases['rest']:.3f} | {figures['idle share']:.2f} | "
                f"{figures['limit_ms']:.3f} |"
            )
        for figures in cases.values():
            top = list(figures["kernels_ms"].items())[:5]
            yield f"- {figures['streams']} streams: " + "; ".join(
                f"{name[:60]} {milliseconds:.3f} ms" for name, milliseconds in top
            )
        if cases:
            plot_stacks(
                self.setting.out / "step.png", "streams", "ms",
                {str(f["streams"]): f["phases_ms"] for f in cases.values()},
            )  # fmt: skip

    def close(self) -> None:
        self._loaded = None

    def _step(self, streams: int) -> Figures:
        loaded = self._load()
        core = loaded.core
        ids = self._start(loaded, streams)
        phases = timed_steps(core, self._steps)
        context = core.scheduler.running[0].num_computed
        busy_ms, wall_ms, kernels = profiled_steps(core, max(2, self._steps // 4), self.setting)
        for request_id in ids:
            core.abort(request_id)
        while core.has_work:
            core.step()
        limit = ModelCost.of(loaded.model.spec).decode(streams, context)
        return {
            "streams": streams,
            "step_ms": sum(phases.values()),
            "phases_ms": phases,
            "device busy_ms": busy_ms,
            "profiled step_ms": wall_ms,
            "idle share": max(0.0, 1 - busy_ms / wall_ms),
            "limit_ms": limit.seconds(self._limits) * 1e3,
            "kernels_ms": kernels,
        }

    def _load(self) -> LoadedCore:
        if self._loaded is None:
            free_memory(self.setting)
            self._limits = Limits.of(self.setting)  # before an engine takes the memory for it
            folder: Path = checkpoint(self.setting, MODEL)
            self._loaded = load_core(folder, device=self.setting.kind, **self._options)
        return self._loaded

    def _start(self, loaded: LoadedCore, streams: int) -> list[str]:
        """Requests that are past their prompts and will not end within the steps to come."""
        model = loaded.model
        preparer = RequestPreparer(
            model.spec, loaded.tokenizer, model.preprocessor, model.max_model_len
        )
        length = 4 * self._steps + 4 * streams
        params = SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True)
        requests = [preparer.prepare(PROMPT, [picture], params) for picture in noise(streams)]
        for request in requests:
            loaded.core.add(request)
        while sum(seq.num_output_tokens > 2 for seq in loaded.core.scheduler.running) < streams:
            loaded.core.step()
        return [request.request_id for request in requests]


def _name(streams: int) -> str:
    return f"{MODEL}, {streams} stream{'s' if streams > 1 else ''}"


def timed_steps(core: EngineCore, steps: int) -> dict[str, float]:
    """Milliseconds of each phase, medians over the steps; "rest" is the step's own."""
    samples: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        spent: dict[str, float] = {}
        for target, attribute, phase in (
            (core.scheduler, "schedule", "schedule"),
            (core.runner.attention, "build", "lay out"),  # within "run", as the next one
            (PagedBatch, "load", "lay out"),  # into a graph's memory
            (core.runner, "run", "run"),
            (core.sampler, "sample", "sample"),
            (SampledTokens, "fetch", "fetch"),
            (core.scheduler, "commit", "commit"),
        ):
            stack.enter_context(_timed(target, attribute, phase, spent))
        for _ in range(steps):
            spent.clear()
            started = time.perf_counter()
            core.step()
            whole = time.perf_counter() - started
            run = spent.get("run", 0.0) - spent.get("lay out", 0.0)  # which is within it
            own = {**dict.fromkeys(PHASES, 0.0), **spent, "run": run}
            own["rest"] = whole - sum(own.values())
            for phase, seconds in own.items():
                samples[phase].append(seconds * 1e3)
    return {phase: median(own) for phase, own in samples.items()}


@contextmanager
def _timed(target: Any, attribute: str, phase: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds what a call takes to its phase; a phase within itself counts once."""
    call = getattr(target, attribute)

    @wraps(call)
    def timed(*arguments: Any, **options: Any) -> Any:
        before, started = spent.get(phase, 0.0), time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent[phase] = before + time.perf_counter() - started

    with mock.patch.object(target, attribute, timed):
        yield


def profiled_steps(
    core: EngineCore, steps: int, setting: Setting
) -> tuple[float, float, dict[str, float]]:
    """Of one step: milliseconds in which the device was busy, milliseconds in all, and the most
    expensive kernels' (on a CPU: operators')."""
    activities = [ProfilerActivity.CPU]
    if setting.is_gpu:
        activities.append(ProfilerActivity.CUDA)
    core.step()
    setting.settle()
    with profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            core.step()
        setting.settle()
        wall = time.perf_counter() - started
    kind = torch.autograd.DeviceType.CUDA if setting.is_gpu else torch.autograd.DeviceType.CPU
    spans: list[tuple[float, float]] = []
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            # A kernel is alone in its time; operators call one another.
            own = event.time_range.elapsed_us() if setting.is_gpu else event.self_cpu_time_total
            kernels[event.name] += own / 1e3 / steps
            spans.append((event.time_range.start, event.time_range.end))
    top = sorted(kernels.items(), key=lambda item: -item[1])[:KERNELS]
    return covered(spans) / 1e3 / steps, wall * 1e3 / steps, dict(top)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time lies in at least one of them."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
