"""What `benchmarks.gpu` is made of: parts, and in each of them cases that run one by one.

A part runs in a process of its own, which writes its record anew after each case. A fault on a GPU
poisons the process that met it, and a bad kernel may never return; so a case that ends the process
is noted as failed, and another process goes on with the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from benchmarks.goals import Goal

if TYPE_CHECKING:
    import torch

Figures: TypeAlias = dict[str, Any]
Scale: TypeAlias = Literal["tiny", "full"]

GRACE_S = 20.0
"""For a case that is under way when its part's time is over; then the process is ended."""
STOP_S = 15.0
"""For a process that is told to end."""
GOES_ON = 75
"""Exit status: the device is broken for this process, and cases are left."""
RUNNING, ERROR, SKIPPED = "running", "error", "skipped"


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        scale: "full": the released models' sizes; "tiny": small ones, to see that it runs.
        out: for the records.
        models: for checkpoints, which are used again where they are there.
    """

    kind: Literal["cuda", "cpu"]
    scale: Scale
    out: Path
    models: Path

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.kind)

    def settle(self) -> None:
        """Waits for the device, so that a fault is met by the case that made it."""
        if self.is_gpu:
            import torch

            torch.cuda.synchronize()

    def is_usable(self) -> bool:
        """Whether the device still answers this process."""
        if not self.is_gpu:
            return True
        import torch

        try:
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception:
            return False
        return True


Case: TypeAlias = Callable[[], Figures]


class Part(ABC):
    """
    Attributes:
        packages: without which it is left out.
        seconds: that it may take of the whole.
        environment: variables of its process.
    """

    name: str
    packages: tuple[str, ...] = ()
    seconds: float
    environment: Mapping[str, str] = {}

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def absence(self) -> str | None:
        """Why it cannot run here, or None."""
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    @abstractmethod
    def cases(self) -> Mapping[str, Case]:
        """By name, in the order in which they run. They may share what is loaded."""

    def goals(self, cases: Mapping[str, Figures]) -> Iterator[Goal]:
        """Of the figures by case, those that have failed left out. A GPU's: they are not asked for
        on a CPU."""
        yield from ()

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        """The figures for people, in Markdown."""
        for name, figures in cases.items():
            yield f"- {name}: " + ", ".join(f"{k} {short(v)}" for k, v in figures.items())

    def close(self) -> None:  # noqa: B027 (most have nothing)
        """Lets go of what is loaded."""


@dataclass
class Record:
    """One part's file.

    Attributes:
        cases: figures by the case's name; {"error": ...} of a failed one, {"skipped": ...} of one
            that cannot run here.
        left: cases that there was no time for.
        absence: why the part could not run at all.
    """

    path: Path
    part: str
    scale: str
    machine: dict[str, Any]
    cases: dict[str, Figures] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    absence: str | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        return cls(path, **json.loads(path.read_text(encoding="utf-8")))

    def write(self) -> None:
        """Whole or not at all."""
        values = {key: value for key, value in vars(self).items() if key != "path"}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.rename(self.path)

    @property
    def succeeded(self) -> dict[str, Figures]:
        bad = (RUNNING, ERROR, SKIPPED)
        return {n: f for n, f in self.cases.items() if not any(mark in f for mark in bad)}

    @property
    def failed(self) -> dict[str, str]:
        return {name: str(f[ERROR]) for name, f in self.cases.items() if ERROR in f}

    @property
    def skipped(self) -> dict[str, str]:
        return {name: str(f[SKIPPED]) for name, f in self.cases.items() if SKIPPED in f}


def run_cases(part: Part, record: Record, until: float) -> int:
    """In the part's process: the cases that the record does not have yet.

    Args:
        until: `time.monotonic()` after which none is begun.

    Returns:
        the exit status.
    """
    cases = part.cases()
    waiting = [name for name in cases if name not in record.cases]
    with _ending_in_order():
        try:
            for name in waiting:
                if time.monotonic() >= until:
                    break
                record.cases[name] = {RUNNING: True}
                record.write()
                started = time.monotonic()
                try:
                    figures = cases[name]()
                    part.setting.settle()
                except Exception as error:
                    traceback.print_exc()
                    figures = {ERROR: f"{type(error).__name__}: {error}"[:2000]}
                figures["seconds"] = round(time.monotonic() - started, 3)
                record.cases[name] = figures
                record.write()
                print(f"  {part.name}: {name}: {_outcome(figures)}", flush=True)
                if ERROR in figures and not part.setting.is_usable():
                    return GOES_ON
            record.write()
        finally:
            part.close()
    return 0


def run_part(part: Part, record: Record, until: float, command: Sequence[str]) -> Record:
    """In the command's process: the part's cases, in as many processes as it takes.

    Args:
        record: an empty one, not written yet.
        command: starts a process that calls `run_cases` with this record's file.
    """
    record.absence = part.absence()
    record.write()
    while record.absence is None and time.monotonic() < until:
        known = len(record.cases)
        process = subprocess.Popen(
            [sys.executable, *command, "--until", repr(until)],
            env={**os.environ, **part.environment},
        )
        ended = _wait(process, until + GRACE_S)
        record = Record.read(record.path)
        for name, figures in record.cases.items():
            if RUNNING in figures:
                record.cases[name] = {ERROR: _cause(process.returncode, ended)}
        if len(record.cases) == known and (process.returncode or not ended):
            record.absence = _cause(process.returncode, ended)
        record.write()
        if process.returncode == 0 or not ended:
            break
    if record.absence is None:
        record.left = [name for name in part.cases() if name not in record.cases]
    if part.setting.is_gpu:
        record.goals = [goal.as_json() for goal in part.goals(record.succeeded)]
    record.write()
    return record


def _wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether it has ended by itself."""
    try:
        process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    except BaseException:  # the command was interrupted
        process.terminate()
        process.wait(STOP_S)
        raise
    return True


def _cause(status: int, ended: bool) -> str:
    if not ended:
        return "it had not ended when the part's time was over"
    if status < 0:
        return f"its process died of {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM closes what is open, as an exception does."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _outcome(figures: Figures) -> str:
    for mark in (ERROR, SKIPPED):
        if mark in figures:
            return f"{mark}: {figures[mark]}"
    return ", ".join(f"{key} {short(value)}" for key, value in figures.items())


def short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, dict)) and len(value) > 4:
        return f"[{len(value)}]"
    return str(value)
