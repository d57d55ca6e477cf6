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


def test_a_taken_port_is_one_line_and_no_ray(
    taken_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launcher, "start_ray", lambda *_: pytest.fail("Ray was started"))
    flags = ["--model-path", str(DEMO_CHECKPOINT), "--host", "127.0.0.1", "--no-register"]
    assert launcher.main([*flags, "--port", str(taken_port)]) == 1
    told = capsys.readouterr().err
    assert f"port {taken_port} is taken" in told
    assert told.count("\n") == 1
