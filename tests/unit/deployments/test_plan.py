"""What the builder asks Ray for, and what it refuses with which message."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster, Node
from deployments.config import AppConfig
from deployments.model_source import default_name, registered_name, resolve_model
from deployments.plan import Plan, make_plan
from models.errors import ConfigurationError
from tests.tiny import write_tiny_llava

LAPTOP = Cluster((Node(cpus=8, gpus=0),))
GPU_BOX = Cluster((Node(cpus=16, gpus=2),))
GROWING = Cluster((Node(cpus=2, gpus=0),), grows=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llava(tmp_path_factory.mktemp("plan") / "llava-tiny"))


def plan(model_path: str, cluster: Cluster = LAPTOP, **args: Any) -> Plan:
    return make_plan(AppConfig(model_path=model_path, no_register=True, **args), cluster)


def test_without_a_gpu_all_cores_of_a_node_are_taken(checkpoint: str) -> None:
    made = plan(checkpoint)
    assert (made.device, made.num_cpus, made.num_gpus, made.max_num_seqs) == ("cpu", 8, 0, 8)


def test_auto_takes_a_gpu_and_its_share_of_the_cores(checkpoint: str) -> None:
    made = plan(checkpoint, GPU_BOX)
    assert (made.device, made.num_cpus, made.num_gpus, made.max_num_seqs) == ("cuda", 8, 1, 64)


def test_cpu_is_kept_where_a_gpu_is(checkpoint: str) -> None:
    assert plan(checkpoint, GPU_BOX, device="cpu").num_gpus == 0


def test_the_door_is_wider_than_what_runs_and_waits(checkpoint: str) -> None:
    made = plan(checkpoint, limit_model_concurrency=5, max_waiting=20)
    assert made.max_num_seqs == 5
    assert made.max_ongoing_requests == 5 + 20 + 16


def test_a_gpu_that_cannot_come_is_refused(checkpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="no GPU.*use device: cpu or auto"):
        plan(checkpoint, LAPTOP, device="cuda")


def test_on_a_cluster_that_grows_a_gpu_is_waited_for_and_that_is_said(
    checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        assert plan(checkpoint, GROWING, device="cuda").num_gpus == 1
    finally:
        logger.removeHandler(caplog.handler)
    assert "replicas wait until it has come" in caplog.text


def test_a_model_that_is_larger_than_a_gpu_takes_several(checkpoint: str) -> None:
    """The tiny one needs 2.3 MiB, its KV cache included."""
    for kibibytes, gpus in ((4096, 1), (2304, 2), (1792, 3)):
        cluster = Cluster((Node(cpus=16, gpus=4),), gpu_bytes=kibibytes << 10)
        made = plan(checkpoint, cluster)
        assert (made.num_gpus, made.num_cpus) == (gpus, 4 * gpus)
        assert plan(checkpoint, cluster, device_map="balanced").num_gpus == 4
        assert plan(checkpoint, cluster, device_map="single").num_gpus == 1


def test_a_model_that_is_larger_than_a_nodes_gpus_is_refused(checkpoint: str) -> None:
    cluster = Cluster((Node(cpus=16, gpus=2),), gpu_bytes=512 << 10)
    with pytest.raises(ConfigurationError, match="the model does not fit.*cuda:0, cuda:1 have"):
        plan(checkpoint, cluster)


def test_where_nothing_is_known_of_the_gpus_one_is_asked_for(checkpoint: str) -> None:
    assert plan(checkpoint, GPU_BOX).num_gpus == 1
    assert plan("Efficient-Large-Model/VILA1.5-40b-AWQ", GPU_BOX).num_gpus == 1


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_map_over_several_gpus_needs_several(checkpoint: str, gpus: int) -> None:
    with pytest.raises(ConfigurationError, match=r"device_map is balanced.*device_map: auto"):
        plan(checkpoint, Cluster((Node(cpus=8, gpus=gpus),)), device_map="balanced")
    growing = Cluster((Node(cpus=8, gpus=gpus),), grows=True)
    assert plan(checkpoint, growing, device_map="balanced", device="cuda").num_gpus == 2


def test_four_bits_without_four_bit_weights_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava-16", awq=False)
    with pytest.raises(ConfigurationError, match="precision is W4A16.*set precision: W16A16"):
        plan(str(folder))
    assert plan(str(folder), precision="W16A16").model_name == "llava-16"


def test_sixteen_bits_of_a_checkpoint_that_has_none_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava-4", awq_only=True)
    with pytest.raises(ConfigurationError, match="W16A16.*set precision: W4A16"):
        plan(str(folder), precision="W16A16")


@pytest.mark.parametrize(
    ("path", "looked"),
    [
        ("no/such/folder/here", f" in {re.escape(str(Path.cwd()))}"),
        ("not a name", f" in {re.escape(str(Path.cwd()))}"),
        ("/no/such/folder", ""),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(path: str, looked: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{path}' is neither a folder{looked} nor a Hub id"
    ):
        plan(path)


def test_a_file_is_no_model_path(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.touch()
    with pytest.raises(ConfigurationError, match="give the checkpoint's folder"):
        plan(str(file))


def test_a_hub_id_is_left_to_the_replica() -> None:
    assert plan("Efficient-Large-Model/VILA1.5-3b-AWQ").model_path == (
        "Efficient-Large-Model/VILA1.5-3b-AWQ"
    )


def test_a_folder_may_exist_on_other_nodes_only() -> None:
    assert resolve_model("/on/the/gpu/nodes", elsewhere=True) == "/on/the/gpu/nodes"


def test_a_relative_path_is_found_beside_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = resolve_model("models/demo", elsewhere=False)
    assert Path(found).is_absolute()
    assert (Path(found) / "scenes.py").is_file()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/VILA1.5-3b-AWQ", "VILA1.5-3b-AWQ"),
        ("/data/VILA1.5-3b-AWQ/", "VILA1.5-3b-AWQ"),
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("runs/llava-7b/checkpoint-500", "llava-7b_checkpoint-500"),
    ],
)
def test_names_are_formed_as_tinychat_forms_them(path: str, name: str) -> None:
    assert default_name(path) == name
    assert registered_name(path, None, "W4A16") == f"{name}-4bit-AWQ"
    assert registered_name(path, None, "W16A16") == name
    assert registered_name(path, "mine", "W4A16") == "mine-4bit-AWQ"
