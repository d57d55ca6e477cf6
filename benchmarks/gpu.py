"""Everything that one GPU can tell, in parts that run one by one and within a time.

    python -m benchmarks.gpu                                     # all of it, within 9 minutes
    python -m benchmarks.gpu --parts correctness,decode --out /tmp/gpu
    python -m benchmarks.gpu --device cpu --scale tiny           # to see that it runs: no GPU

Each part writes OUT/PART.json as it goes, and what it says to OUT/PART.md. The status is 1 if
something failed or a goal is missed, 2 for wrong arguments. docs/gpu.md says more.

    limits        what the device copies, reads and multiplies at most
    correctness   every tiny checkpoint, the demo and every 4-bit backend against the CPU's answers
    linears       the 4-bit layers, backend by backend (benchmarks.gpu_linears)
    decode        a 7B and a 3B at full size, beside transformers in fp16 and beside the limits
    step          where a step of decoding goes
    application   HTTP against the bare engine, where there is Ray
    peers         llm-awq's own kernels, where they have been built, and what else is there
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.command_line import HelpFormatter

if TYPE_CHECKING:
    from benchmarks.gpu_parts import Figures, Part, Record, Setting

PARTS = {
    "limits": "benchmarks.gpu_limits:LimitsPart",
    "correctness": "benchmarks.gpu_correctness:CorrectnessPart",
    "linears": "benchmarks.gpu_linears_part:LinearsPart",
    "decode": "benchmarks.gpu_decode:DecodePart",
    "step": "benchmarks.gpu_step:StepPart",
    "application": "benchmarks.gpu_application:ApplicationPart",
    "peers": "benchmarks.gpu_peers:PeersPart",
}
"""In the order in which they run."""
NEEDED = {
    "torch": "all", "transformers": "all", "accelerate": "all", "safetensors": "all",
    "PIL": "all (the package pillow)", "jinja2": "all", "numpy": "all", "tqdm": "all",
    "sentencepiece": "all: tokenizers of LLaVA and VILA",
}  # fmt: skip
"""Without one of these nothing runs."""
WANTED = {
    "triton": "every Triton kernel; slower products take their place",
    "google.protobuf": "some tests of tokenizers (the package protobuf)",
    "llguidance": "answers in a given form, which no part asks for (some tests do)",
    "pytest": "the GPU tests", "hypothesis": "the GPU tests",
    "ray": "the part application", "fastapi": "the part application",
    "aiohttp": "the part application", "pydantic": "the part application",
    "yaml": "the part application (the package pyyaml)",
    "matplotlib": "plots", "gemlite": "a peer of the part linears",
    "humming": "a peer of the part linears (the package humming-kernels)",
    "flashinfer": "a peer of the decode kernel", "awq_inference_engine": "llm-awq's own kernels",
}  # fmt: skip
"""What is lost without them."""
BUDGET_S = 540.0
LEAST_S = 5.0
"""With less than that no part is begun."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="which of them, with commas; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-records"), help="folder for records, made if needed"
    )
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "tinychat-gpu-models",
        help="folder for checkpoints of random weights, some 8 GB at full scale; used again",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, metavar="S",
        help="seconds for all parts, each of which has a share; what is not done by then is said",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu only shows that it runs"
    )
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="the models' sizes"
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # a part's own process
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    names = [name for name in options.parts.split(",") if name]
    for name in names:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; parts: {', '.join(PARTS)}")
    missing = absent(NEEDED)
    if missing:
        print("not installed, and nothing runs without: " + ", ".join(missing))
        return 1

    from benchmarks.gpu_parts import Record, Setting, run_cases

    setting = Setting(options.device, options.scale, options.out, options.models)
    if options.until is not None:
        record = Record.read(options.out / f"{names[0]}.json")
        return run_cases(load_part(names[0])(setting), record, options.until)

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; --device cpu --scale tiny shows that everything runs")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    return run_all(names, setting, options.budget_s)


def run_all(names: Sequence[str], setting: Setting, budget_s: float) -> int:
    from benchmarks.machine import describe_gpu, describe_machine

    machine = {**describe_machine(), **describe_gpu()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not setting.is_gpu:
        print("No GPU is measured here: this shows that every part runs, and no speed.")
    for module in absent(WANTED):
        print(f"not installed: {module}, which costs: {WANTED[module]}")
    end = time.monotonic() + budget_s
    stretch = max(1.0, budget_s / BUDGET_S)
    records = []
    for name in names:
        if time.monotonic() + LEAST_S >= end:
            print(f"\n## {name}\n\nnot run: the time is over")
            continue
        print(f"\n## {name}\n", flush=True)
        records.append(run_one(name, setting, machine, end, stretch))
    failures = [f"{r.part}: {name}: {why}" for r in records for name, why in r.failed.items()]
    unfinished = len(records) < len(names) or any(record.left for record in records)
    goals = [goal for record in records for goal in record.goals]
    missed = [goal for goal in goals if not goal["is_met"]]
    print(f"\n{len(failures)} case(s) failed, {len(missed)} of {len(goals)} goals are missed")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures or missed or unfinished else 0


def run_one(
    name: str, setting: Setting, machine: dict[str, Any], end: float, stretch: float
) -> Record:
    """
    Args:
        end: of all parts.
        stretch: of the part's own time.
    """
    from benchmarks.gpu_parts import Record, run_part

    record = Record(setting.out / f"{name}.json", name, setting.scale, machine)
    try:
        part = load_part(name)(setting)
    except (ImportError, AttributeError) as error:
        record.absence = f"cannot be imported: {error}"
        record.write()
        print(f"not run: {record.absence}")
        return record
    command = [
        "-m", "benchmarks.gpu", "--parts", name, "--out", str(setting.out),
        "--models", str(setting.models), "--device", setting.kind, "--scale", setting.scale,
    ]  # fmt: skip
    record = run_part(part, record, min(end, time.monotonic() + part.seconds * stretch), command)
    text = "\n".join(summary(part, record))
    (setting.out / f"{name}.md").write_text(f"## {name}\n\n{text}\n", encoding="utf-8")
    print(text, flush=True)
    return record


def summary(part: Part, record: Record) -> Iterable[str]:
    if record.absence is not None:
        yield f"not run: {record.absence}"
        return
    yield ""
    yield from part.lines(record.succeeded)
    for name, reason in record.skipped.items():
        yield f"- {name}: skipped: {reason}"
    for name, reason in record.failed.items():
        yield f"- {name}: FAILED: {reason}"
    if record.left:
        yield "- no time was left for: " + ", ".join(record.left)
    for goal in record.goals:
        yield "- " + goal_line(goal)


def goal_line(goal: Figures) -> str:
    from benchmarks.goals import Goal

    values = {key: value for key, value in goal.items() if key != "is_met"}
    return str(Goal(**values))


def absent(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in
        return False


def load_part(name: str) -> type[Part]:
    """
    Raises:
        ImportError, AttributeError: its module, or something that this needs, is not there.
    """
    module, _, attribute = PARTS[name].partition(":")
    part: type[Part] = getattr(import_module(module), attribute)
    return part


if __name__ == "__main__":
    sys.exit(main())
