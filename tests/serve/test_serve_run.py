"""`serve run serve_config.yaml`, as the README says it, from another folder; with Ray's own proxy,
and with HAProxy as `make serve` has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from models.demo import simple_scene
from tests.serve.worker import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
HEEDING_SIGINT = (
    "import os, signal, sys; "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
"""Runs a command. What a shell has started in the background, these tests perhaps, ignores SIGINT,
and so would all that it starts."""


def haproxy_environment() -> dict[str, str]:
    """As `eval "$(python -m deployments.ingress)"` sets it."""
    printed = subprocess.run(
        [sys.executable, "-m", "deployments.ingress"], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines())


@pytest.fixture(scope="module", params=["proxy", "haproxy"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("elsewhere")
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    assert config["http_options"]["port"] == 21002
    port = config["http_options"]["port"] = free_port()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")
    } | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    if request.param == "haproxy":
        environment |= haproxy_environment()
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable, "-c", HEEDING_SIGINT,
                Path(sys.executable).with_name("serve"), "run", folder / "config.yaml",
            ],
            cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
        except (requests.RequestException, ValueError):
            return False

    try:
        wait_until(healthy, "the worker is up", START_TIMEOUT_S)
        running = [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
        wanted = environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert ("haproxy" in running) == wanted
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def test_it_answers_the_command_line_client(url: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    simple_scene("green", "triangle").save(file)
    finished = subprocess.run(
        [sys.executable, "-m", "deployments.client", file, "What is in this image?", "--url", url],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert finished.stdout == "The image shows a green triangle.\n"


def test_it_is_registered_as_tinychat_would_call_it(url: str) -> None:
    status = requests.post(f"{url}/worker_get_status", timeout=10).json()
    assert status == {"model_names": ["llava-demo-4bit-AWQ"], "speed": 1, "queue_length": 0}


def test_every_commented_setting_exists() -> None:
    """What the file offers in comments must be accepted when the comments are taken away."""
    from deployments.config import AppConfig

    lines = (ROOT / "serve_config.yaml").read_text(encoding="utf-8").splitlines()
    known = AppConfig.model_fields
    offered = [line.split("#", 1)[1].split(":")[0].strip() for line in lines if "# " in line]
    names = [name for name in offered if name.isidentifier() and name.islower() and "_" in name]
    settings = [name for name in names if name in known]
    assert {"quant_path", "max_num_seqs", "controller_addr", "gpu_memory_utilization"} <= set(
        settings
    )
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

    elsewhere = {
        *DeploymentSchema.model_fields, *RayActorOptionsSchema.model_fields,
        *AutoscalingConfig.model_fields,
    }  # fmt: skip
    assert [name for name in names if name not in known and name not in elsewhere] == []
