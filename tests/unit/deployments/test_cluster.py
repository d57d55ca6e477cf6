"""`Cluster.of`: what Ray says of its nodes -> what a replica can ask for."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import ray

from deployments import cluster
from deployments.cluster import NODE_GROUP_LABEL, Cluster, Node


def ray_node(
    cpus: float | None = 8, gpus: float | None = None, *, alive: bool = True, labels: Any = None
) -> dict[str, Any]:
    """As `ray.nodes()` has it: a resource that a node has none of is not named."""
    resources = {"CPU": cpus, "GPU": gpus, "memory": 1e9}
    return {
        "Alive": alive,
        "Resources": {name: value for name, value in resources.items() if value is not None},
        "Labels": labels,
    }


def test_a_single_node_does_not_grow() -> None:
    one = Cluster.of([ray_node(4)])
    assert one == Cluster((Node(4, 0),), grows=False)
    assert (one.has_gpu, one.cpus) == (False, 4)


def test_several_nodes_may_become_more() -> None:
    assert Cluster.of([ray_node(), ray_node()]).grows


def test_a_node_that_a_launcher_started_may_get_company() -> None:
    assert Cluster.of([ray_node(labels={NODE_GROUP_LABEL: "head"})]).grows
    assert not Cluster.of([ray_node(labels={"ray.io/node-id": "abc"})]).grows


def test_dead_nodes_do_not_count() -> None:
    gone = ray_node(64, 8, alive=False, labels={NODE_GROUP_LABEL: "gpu"})
    assert Cluster.of([ray_node(4), gone]) == Cluster((Node(4, 0),), grows=False)


def test_the_largest_node_decides_the_cpus() -> None:
    assert Cluster.of([ray_node(None), ray_node(4), ray_node(16)]).cpus == 16


def test_there_is_always_a_cpu_to_ask_for() -> None:
    """A head node is often started with `num_cpus: 0`."""
    assert Cluster.of([ray_node(None)]).cpus == 1
    assert Cluster.of([]).cpus == 1
    assert Cluster.of([ray_node(0.5, 1)]).cpus_per_gpu == 1


def test_a_replicas_cpus_fit_beside_every_gpu() -> None:
    """On the node with the fewest; nodes without a GPU do not matter."""
    nodes = [ray_node(64), ray_node(32, 4), ray_node(48, 8)]
    assert Cluster.of(nodes).has_gpu
    assert Cluster.of(nodes).cpus_per_gpu == 6


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2), ("0", 1), ("0,1", 2), ("0,1,2", 2), ("GPU-aaaa,GPU-bbbb", 2),
        ("", 0), ("-1", 0), ("0,-1,1", 1),
    ],
)  # fmt: skip
def test_gpus_of_this_machine_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-aaaa)\nGPU 1: NVIDIA H100 (UUID: GPU-bbbb)\n"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout=listing),
    )
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster._local_gpus() == count


def test_the_smallest_gpu_says_how_much_a_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout="81559\n24576\n"),
    )
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [ray_node(8, 2), ray_node(8, 4)])
    found = Cluster.look()
    assert (found.gpu_bytes, found.gpus) == (24 << 30, 4)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cluster._local_gpus() == 0


def test_a_driver_that_hangs_is_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", hang)
    assert cluster._local_gpus() == 0


def test_without_ray_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_local_gpus", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = Cluster.look()
    assert len(here.nodes) == 1
    assert here.cpus >= 1
    assert not here.grows
    monkeypatch.setenv("RAY_ADDRESS", "ray://192.0.2.1:10001")
    assert Cluster.look().grows


def test_with_ray_it_is_rays_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [ray_node(3, 1)])
    assert Cluster.look() == Cluster((Node(3, 1),))
