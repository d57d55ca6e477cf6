"""A part whose cases end in every way that a process can; a program, as `benchmarks.gpu` is one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu_parts import Case, Figures, Part, Record, Setting, run_cases


def setting(folder: Path) -> Setting:
    return Setting("cpu", "tiny", folder, folder)


class FragilePart(Part):
    name = "fragile"
    seconds = 60.0

    def cases(self) -> Mapping[str, Case]:
        return {"sound": _answer, "raises": _raise, "dies": _die, "after": _answer}

    def close(self) -> None:
        (self.setting.out / "closed").touch()


class HangingPart(Part):
    name = "hanging"
    seconds = 60.0

    def cases(self) -> Mapping[str, Case]:
        return {"sound": _answer, "hangs": _hang, "after": _answer}

    def close(self) -> None:
        (self.setting.out / "closed").touch()


class UnloadablePart(FragilePart):
    """Its process ends before its first case."""

    name = "unloadable"


PARTS: dict[str, type[Part]] = {"fragile": FragilePart, "hanging": HangingPart}


def _answer() -> Figures:
    return {"answer": 42}


def _raise() -> Figures:
    raise ValueError("no such layer")


def _die() -> Figures:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _hang() -> Figures:
    time.sleep(600)
    return {}


if __name__ == "__main__":
    _, name, path, _, until = sys.argv
    folder = Path(path)
    record = Record.read(folder / f"{name}.json")
    sys.exit(run_cases(PARTS[name](setting(folder)), record, float(until)))
