"""`python -m deployments`: TinyChat's flags, and a drain on SIGTERM that loses nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from deployments.launcher import app_config, build_parser, main
from models.demo import DEMO_CHECKPOINT, simple_scene
from tests.serve.worker import Worker, base64_of, free_port, prompt_of, wait_until

LONG = {
    "prompt": prompt_of("What?"), "images": [base64_of(simple_scene("red", "ring"))],
    "temperature": 0, "max_new_tokens": 700, "ignore_eos": True,
}  # fmt: skip


def test_flags_may_be_abbreviated_as_tinychats_documentation_does() -> None:
    options = build_parser().parse_args([
        "--host", "0.0.0.0", "--port", "40000", "--model-path", "/m", "--controller",
        "http://localhost:10000", "--worker", "http://localhost:40000", "--quant", "/m/q.pt",
        "--precision", "W4A16",
    ])  # fmt: skip
    config = app_config(options)
    assert config.controller_addr == "http://localhost:10000"
    assert config.worker_addr == "http://localhost:40000"
    assert config.quant_path == "/m/q.pt"


def test_defaults_are_tinychats() -> None:
    config = app_config(build_parser().parse_args(["--model-path", "/m"]))
    assert config.running_limit == 5
    assert config.device == "auto"
    assert not config.no_register
    assert config.controller_addr == "http://localhost:21001"
    assert config.worker_addr == "http://localhost:21002"


def test_a_wrong_flag_is_one_line_and_no_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", "/m", "--controller", "localhost:10000"]) == 2
    assert "controller_addr" in capsys.readouterr().err


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[Worker, subprocess.Popen[bytes], Path]]:
    port = free_port()
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "deployments", "--model-path", str(DEMO_CHECKPOINT),
                "--host", "127.0.0.1", "--port", str(port),
                # Nobody listens there: it must not die for it.
                "--controller", f"http://127.0.0.1:{free_port()}",
            ],
            cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}
        except (requests.RequestException, ValueError):
            return False

    try:
        wait_until(healthy, "the worker is up", 120)
        yield Worker(url, None), process, log  # type: ignore[arg-type]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_it_drains_under_load_and_exits_with_zero(
    launched: tuple[Worker, subprocess.Popen[bytes], Path],
) -> None:
    worker, process, log = launched
    assert worker.status()["model_names"] == ["llava-demo-4bit-AWQ"]
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(worker.last, **LONG) for _ in range(8)]  # five run, three wait
        wait_until(lambda: worker.status()["queue_length"] == 8, "all are inside")
        process.send_signal(signal.SIGTERM)

        def is_closed() -> bool:
            return requests.get(f"{worker.url}/health", timeout=5).status_code == 503

        wait_until(is_closed, "the door is closed")
        refused = worker.records(LONG)[-1]
        assert refused["error_code"] == 1
        assert "shutting down" in refused["text"]
        answers = [client.result() for client in clients]
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {700}
    assert process.wait(timeout=60) == 0, log.read_text()
