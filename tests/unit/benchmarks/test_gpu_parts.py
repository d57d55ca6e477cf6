"""Parts of `benchmarks.gpu`: what becomes of cases that fail, die, hang or come too late."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Part, Record, run_cases, run_part
from tests.unit.benchmarks.fragile_part import FragilePart, HangingPart, UnloadablePart, setting

MACHINE = {"cpus": 2}


def run(kind: type[Part], folder: Path, seconds: float) -> Record:
    part = kind(setting(folder))
    record = Record(folder / f"{part.name}.json", part.name, "tiny", MACHINE)
    command = ["-m", "tests.unit.benchmarks.fragile_part", part.name, str(folder)]
    return run_part(part, record, time.monotonic() + seconds, command)


def test_a_case_that_ends_its_process_costs_no_other_case(tmp_path: Path) -> None:
    record = run(FragilePart, tmp_path, 60)
    assert list(record.cases) == ["sound", "raises", "dies", "after"]
    assert [record.cases[name]["answer"] for name in ("sound", "after")] == [42, 42]
    assert record.failed == {
        "raises": "ValueError: no such layer", "dies": "its process died of SIGSEGV",
    }  # fmt: skip
    assert (record.left, record.absence) == ([], None)
    stored = json.loads(record.path.read_text())
    assert (stored["machine"], stored["cases"]) == (MACHINE, record.cases)


def test_a_case_that_never_ends_is_ended_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "GRACE_S", 0.0)
    record = run(HangingPart, tmp_path, 3)
    assert list(record.succeeded) == ["sound"] and record.left == ["after"]
    assert record.failed == {"hangs": "it had not ended when the part's time was over"}
    assert (tmp_path / "closed").exists()  # what was open was closed


def test_a_part_whose_process_cannot_begin_says_so(tmp_path: Path) -> None:
    record = run(UnloadablePart, tmp_path, 60)
    assert (record.cases, record.absence) == ({}, "its process ended with status 1")


def test_no_case_begins_after_the_end(tmp_path: Path) -> None:
    record = Record(tmp_path / "fragile.json", "fragile", "tiny", MACHINE)
    assert run_cases(FragilePart(setting(tmp_path)), record, time.monotonic()) == 0
    assert record.cases == {}


def test_a_broken_device_ends_the_process_so_that_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts.Setting, "is_usable", lambda self: False)
    record = Record(tmp_path / "fragile.json", "fragile", "tiny", MACHINE)
    until = time.monotonic() + 60
    assert run_cases(FragilePart(setting(tmp_path)), record, until) == gpu_parts.GOES_ON
    assert list(record.cases) == ["sound", "raises"]


def test_a_part_that_lacks_a_package_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FragilePart, "packages", ("json", "no_such_package"))
    assert run(FragilePart, tmp_path, 60).absence == "not installed: no_such_package"


def test_what_is_not_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--scale", "tiny", "--out", str(tmp_path), "--budget-s", "0"]
    assert gpu.main([*options, "--parts", "limits,step"]) == 1
    assert capsys.readouterr().out.count("not run: the time is over") == 2
    with pytest.raises(SystemExit):
        gpu.main([*options, "--parts", "speed"])
    assert "there is no part 'speed'; parts: limits, correctness" in capsys.readouterr().err


@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_has_its_name(name: str) -> None:
    if name == "linears":
        pytest.importorskip("benchmarks.gpu_linears")
    assert gpu.load_part(name).name == name


def test_missing_packages_are_found_inside_others_too() -> None:
    assert gpu.absent(["json", "json.decoder", "no_such.package"]) == ["no_such.package"]
