"""Which processors the nodes have on which a replica may run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import ray

NODE_GROUP_LABEL = "ray.io/node-group"
"""Set on nodes that a cluster launcher or KubeRay has started, i.e. where more may come."""


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """
    Attributes:
        grows: nodes may be added later: there are several already, or what started them is a
            cluster launcher or KubeRay.
        gpu_bytes: memory of a GPU, of the smallest on the machine that asks; None if it has none.
            Ray does not know it.
    """

    nodes: tuple[Node, ...]
    grows: bool = False
    gpu_bytes: int | None = None

    @property
    def has_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Of the node with the most."""
        return max([0, *(int(node.gpus) for node in self.nodes)])

    @property
    def cpus(self) -> int:
        """Of the largest node."""
        return max([1, *(int(node.cpus) for node in self.nodes)])

    @property
    def cpus_per_gpu(self) -> int:
        """What a replica may take beside each GPU, on any node that has one."""
        shares = [int(node.cpus / node.gpus) for node in self.nodes if node.gpus >= 1]
        return max(1, min(shares, default=1))

    @classmethod
    def look(cls) -> Cluster:
        """The cluster that this process is connected to, else this machine.

        `serve run CONFIG.yaml` builds the application inside the cluster, so the first is the rule;
        `serve run deployments.app:build` builds it before Ray has started.
        """
        gpu_bytes = _gpu_bytes()
        if ray.is_initialized():
            return replace(cls.of(ray.nodes()), gpu_bytes=gpu_bytes)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        grows = bool(os.environ.get("RAY_ADDRESS"))
        return cls((Node(cpus or 1, _local_gpus()),), grows, gpu_bytes)

    @classmethod
    def of(cls, ray_nodes: Iterable[Mapping[str, Any]]) -> Cluster:
        """From what `ray.nodes()` returns."""
        alive = [node for node in ray_nodes if node["Alive"]]
        resources = [node.get("Resources", {}) for node in alive]
        return cls(
            tuple(Node(r.get("CPU", 0), r.get("GPU", 0)) for r in resources),
            grows=len(alive) > 1
            or any(NODE_GROUP_LABEL in (node.get("Labels") or {}) for node in alive),
        )


def _local_gpus() -> int:
    """How many NVIDIA GPUs the driver shows, as far as CUDA_VISIBLE_DEVICES allows."""
    count = sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    # CUDA reads the list up to the first entry that is no device; "-1" is how people write "none".
    devices = takewhile(lambda entry: entry and not entry.startswith("-"), visible.split(","))
    return min(count, len(list(devices)))


def _gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU of this machine."""
    lines = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    sizes = [int(line) for line in lines if line.strip().isdigit()]  # in MiB
    return min(sizes) << 20 if sizes else None


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=20, check=False
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
