"""`python -m deployments`: what can be told to be wrong before Ray starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from deployments import launcher
from models.demo import DEMO_CHECKPOINT


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launcher, "start_ray", lambda *_: pytest.fail("Ray was started"))


def test_a_taken_port_is_one_line_and_no_ray(
    taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-path", str(DEMO_CHECKPOINT), "--host", "127.0.0.1", "--no-register"]
    assert launcher.main([*flags, "--port", str(taken_port)]) == 1
    told = capsys.readouterr().err
    assert f"port {taken_port} is taken" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model-path", "/data/nowhere"], "'/data/nowhere' is neither a folder"),
        (["--model-path", str(DEMO_CHECKPOINT), "--quant-path", "nowhere.pt"], "nowhere.pt"),
        (["--model-path", str(DEMO_CHECKPOINT), "--controller", "localhost:1"], "controller_addr"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_no_ray(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main([*flags, "--port", "0"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
