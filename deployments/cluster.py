"""Which processors the nodes have on which a replica may run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """

    nodes: tuple[Node, ...]
    grows: bool = False

    @property
    def has_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

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
        if ray.is_initialized():
            return cls.of(ray.nodes())
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls((Node(cpus or 1, _local_gpus()),), grows=bool(os.environ.get("RAY_ADDRESS")))

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
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listing = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    # CUDA reads the list up to the first entry that is no device; "-1" is how people write "none".
    devices = takewhile(lambda entry: entry and not entry.startswith("-"), visible.split(","))
    return min(count, len(list(devices)))
