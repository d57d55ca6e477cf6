"""A real Ray and a real Ray Serve, on free ports, once for all tests here.

Applications are deployed as `serve run CONFIG.yaml` deploys them: the configuration is validated,
built inside the cluster, and overridden by its `deployments:` section.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from models.demo import DEMO_CHECKPOINT
from tests.serve.worker import Worker, free_port, wait_until
from tests.tiny import write_tiny_llava

DEPLOY_TIMEOUT_S = 90.0


class Deployer:
    """Ray Serve takes one configuration of all applications at a time, so it is kept here."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._applications: dict[str, dict[str, Any]] = {}

    def deploy(self, name: str, *, options: dict[str, Any] | None = None, **args: Any) -> Worker:
        """
        Args:
            options: of the ModelWorker deployment, as under `deployments:` in the YAML.
            args: the application's.
        """
        self.submit(name, options=options, **args)
        wait_until(lambda: self._settled(name), f"{name} is deployed", DEPLOY_TIMEOUT_S)
        status = serve.status().applications[name]
        assert status.status == "RUNNING", status
        return Worker(f"{self.url}/{name}", serve.get_app_handle(name))

    def failure(self, name: str, **args: Any) -> str:
        """The message of an application that must not come up."""
        self.submit(name, **args)
        wait_until(lambda: self._settled(name), f"{name} is refused", DEPLOY_TIMEOUT_S)
        status = serve.status().applications[name]
        assert status.status == "DEPLOY_FAILED", status
        self.delete(name)
        return "\n".join([status.message, *(d.message for d in status.deployments.values())])

    def submit(self, name: str, *, options: dict[str, Any] | None = None, **args: Any) -> None:
        resources = {"ray_actor_options": {"num_cpus": 1}}
        self._applications[name] = {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "deployments.app:build",
            "args": {"no_register": True, **args},
            "deployments": [{"name": "ModelWorker", **resources, **(options or {})}],
        }
        self._apply()

    def delete(self, name: str) -> None:
        del self._applications[name]
        self._apply()
        wait_until(lambda: name not in serve.status().applications, f"{name} is deleted")

    def _apply(self) -> None:
        config = ServeDeploySchema.model_validate({
            "applications": list(self._applications.values())
        })  # fmt: skip
        _get_global_client().deploy_apps(config, _blocking=False)

    def _settled(self, name: str) -> bool:
        status = serve.status().applications.get(name)
        return status is not None and status.status in {"RUNNING", "DEPLOY_FAILED", "UNHEALTHY"}


class Deploy(Protocol):
    def __call__(
        self, name: str, *, options: dict[str, Any] | None = None, **args: Any
    ) -> Worker: ...


@pytest.fixture(scope="session")
def deployer() -> Iterator[Deployer]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is left in the home folder
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    port = free_port()
    ray.init(
        address="local", num_cpus=32, include_dashboard=False, object_store_memory=100 << 20,
        log_to_driver=False, configure_logging=False, namespace="serve",
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield Deployer(port)
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def deploy(deployer: Deployer) -> Iterator[Deploy]:
    """Deploys applications that live until the module's last test."""
    names: list[str] = []

    def deploy_one(name: str, *, options: dict[str, Any] | None = None, **args: Any) -> Worker:
        names.append(name)
        return deployer.deploy(name, options=options, **args)

    try:
        yield deploy_one
    finally:
        for name in names:
            deployer.delete(name)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; answers are nonsense and, with `ignore_eos`, as long as one likes."""
    return write_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "llava-tiny")


@pytest.fixture(scope="module")
def tiny(deploy: Deploy, tiny_llava: Path) -> Worker:
    """A worker of which only the behaviour matters, not what it says."""
    return deploy("tiny", model_path=str(tiny_llava))


@pytest.fixture(scope="module")
def demo(deploy: Deploy) -> Worker:
    """The demo model, as serve_config.yaml serves it."""
    return deploy("demo", model_path=str(DEMO_CHECKPOINT))
