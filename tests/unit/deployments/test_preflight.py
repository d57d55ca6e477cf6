"""A wrong configuration is told in one line, before Ray starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments.preflight import is_taken, main
from models.demo import DEMO_CHECKPOINT

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = (ROOT / "serve_config.yaml").read_text(encoding="utf-8")
MODEL_PATH = "models/demo/checkpoint/llava-demo "


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one that ships, on a free port."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "config.yaml"
    path.write_text(SHIPPED.replace("  port: 21002", f"  port: {free_port()}"))
    return path


def told(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_configuration_that_ships_is_right(config: Path) -> None:
    assert main([str(config)]) == 0


@pytest.mark.parametrize(
    ("right", "wrong", "hints"),
    [
        (MODEL_PATH, "/data/nowhere", ["model_path", "'/data/nowhere'", "neither a folder"]),
        (MODEL_PATH, f"{DEMO_CHECKPOINT}/config.json ", ["is a file"]),
        ("precision: W4A16 ", "quant_path: nowhere.pt ", ["nowhere.pt"]),
        ("device: auto ", "device: cuda ", ["no GPU"]),
        ("precision: W4A16 ", "precison: W4A16 ", ["did you mean 'precision'?"]),
        ("precision: W4A16 ", "precision: W8A8 ", ["precision", "'W4A16' or 'W16A16'"]),
        ("no_register: true ", "num_replicas: 2 ", ["belongs under `deployments:`"]),
        ("applications:\n", "applications: [\n", ["is not YAML"]),
        ("http_options:", "http_option:", ["top of the file", "did you mean 'http_options'?"]),
        ("  host: 127", "  hots: 127", ["http_options: ", "did you mean 'host'?"]),
        ("route_prefix: /", "max_num_seqs: 4", ["'max_num_seqs' belongs under `args:`"]),
        (
            "    # deployments:\n",
            "    deployments: [{name: ModelWorker, num_replica: 2}]\n",
            ["deployments: unknown key 'num_replica'", "did you mean 'num_replicas'?"],
        ),
        (
            "    # deployments:\n",
            "    deployments: [{name: ModelWorker, autoscaling_config: {max_replica: 2}}]\n",
            ["autoscaling_config: ", "did you mean 'max_replicas'?"],
        ),
        (
            "    # deployments:\n",
            "    deployments: [{name: Worker, num_replicas: 2}]\n",
            ["there is no 'Worker'; known: ModelWorker, ControllerLink"],
        ),
    ],
)
def test_a_mistake_is_one_line(
    config: Path, right: str, wrong: str, hints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text()
    assert right in text
    config.write_text(text.replace(right, wrong, 1))
    line = told(config, capsys)
    assert line.startswith(f"{config}: ")
    assert all(hint in line for hint in hints)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(tmp_path / "nowhere.yaml", capsys).endswith(
        "nowhere.yaml: No such file or directory"
    )


def test_a_taken_port_is_told_unless_the_cluster_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "config.yaml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path.write_text(SHIPPED.replace("  port: 21002", f"  port: {port}"))
        assert f"port {port} is taken" in told(path, capsys)
        monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        assert main([str(path)]) == 0


def test_a_host_that_does_not_exist_is_left_to_ray_serve() -> None:
    assert not is_taken("no.such.host.invalid", 21002)
