"""Where a step of decoding goes on a CPU: scheduling, laying out, the model, sampling, booking.

    python -m benchmarks.steps [FOLDER] [--streams 1 8 32] [--record NAME] [--beside NAME]

The core is driven without its thread, and its parts are timed from outside. Each request has a
prompt of 300 tokens behind it. `--beside` puts an earlier record's bars next to these.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import busy_cpus
from benchmarks.report import RECORDS, plot_stacks, write_figures
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT

if TYPE_CHECKING:
    from models.engine.core import EngineCore

PROMPT = 300
STEPS = 200


def start(core: EngineCore, streams: int) -> list[str]:
    """Requests that are past their prompts and will not end within the steps to come."""
    from models import SamplingParams
    from models.engine.messages import GenerationRequest

    params = SamplingParams(temperature=0, max_new_tokens=10 * STEPS, ignore_eos=True)
    names = [f"stream {index}" for index in range(streams)]
    for index, name in enumerate(names):
        core.add(GenerationRequest(name, [5 + index] * PROMPT, (), params))
    while min((seq.num_output_tokens for seq in core.scheduler.running), default=0) < 2 or (
        core.scheduler.waiting
    ):
        core.step()
    return names


def measure(folder: Path, streams: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds of each phase, medians over STEPS, by the number of streams."""
    from benchmarks.gpu_step import timed_steps
    from models.loading import load_core

    core = load_core(
        folder, device="cpu", max_num_seqs=max(streams), max_prefill_slowdown=None
    ).core
    phases = {}
    for count in streams:
        names = start(core, count)
        phases[str(count)] = timed_steps(core, STEPS)
        for name in names:
            core.abort(name)
    return phases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEMO_CHECKPOINT, help="a checkpoint"
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 32], help="sequences in a step"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    parser.add_argument("--beside", metavar="NAME", help="an earlier record, for the plot")
    options = parser.parse_args(arguments)
    busy = busy_cpus()
    phases = measure(options.folder, options.streams)
    names = list(next(iter(phases.values())))
    print("| streams | step, ms | " + " | ".join(names) + " |\n|---:|" + "---:|" * (len(names) + 1))
    for count, own in phases.items():
        parts = " | ".join(f"{own[name]:.2f}" for name in names)
        print(f"| {count} | {sum(own.values()):.2f} | {parts} |")
    if options.record:
        write_figures(
            options.record, model=options.folder.name, busy_cpus_before=busy,
            busy_cpus_after=busy_cpus(), prompt_tokens=PROMPT, steps=STEPS, phases_ms=phases,
        )  # fmt: skip
        bars = {}
        earlier = (
            json.loads((RECORDS / f"{options.beside}.json").read_text())["phases_ms"]
            if options.beside
            else {}
        )
        for count, own in phases.items():
            if count in earlier:
                bars[f"{count}, before"] = {name: earlier[count].get(name, 0.0) for name in names}
            bars[f"{count}, now" if earlier else count] = own
        plot_stacks(RECORDS / f"{options.record}.png", "streams", "ms a step", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
