"""What runs on Ray: ModelReplica, a ModelWorker that is its own HTTP ingress, and LinkReplica.

A chunk that crosses a DeploymentHandle costs more than the token in it, so the class that holds
the model also answers HTTP. The same methods serve DeploymentHandle callers.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.controller_link import ControllerLink
from deployments.door import Door, shrink
from deployments.http_app import build_http_app
from deployments.load_board import ApplicationLoad
from deployments.load_reporter import LoadReporter
from deployments.model_worker import ModelWorker
from deployments.plan import Plan

if TYPE_CHECKING:
    from models import Engine

logger = logging.getLogger("ray.serve")


class ModelReplica(ModelWorker):
    """One replica: loads its engine when it starts, and is ready once that has answered."""

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, plan: Plan, link: DeploymentHandle[Any] | None = None
    ) -> None:
        """
        Args:
            link: the application's ControllerLink, where it registers with a controller.

        Raises:
            TinyChatError: the checkpoint or the options cannot be served here.
        """
        # Ray Serve awaits constructors; Python's type system knows of no such thing.
        max_ongoing = live_max_ongoing_requests(plan.max_ongoing_requests)
        max_num_seqs, max_waiting = shrink(max_ongoing, plan.max_num_seqs, plan.max_waiting)
        if (max_num_seqs, max_waiting) != (plan.max_num_seqs, plan.max_waiting):
            logger.warning(
                "max_ongoing_requests is %d, so max_num_seqs is %d and max_waiting is %d here",
                max_ongoing, max_num_seqs, max_waiting,
            )  # fmt: skip
        # Loading takes from seconds to minutes; on the event loop it would fail health checks.
        load = partial(load_replica_engine, config, plan, max_num_seqs)
        engine = await asyncio.get_running_loop().run_in_executor(None, load)
        door = Door(
            max_num_seqs, max_waiting, partial(live_max_ongoing_requests, plan.max_ongoing_requests)
        )
        super().__init__(config, plan.model_name, engine, door)
        await self.warm_up()
        self._link = link
        self._reporter: LoadReporter | None = None
        if link is not None:
            self._reporter = LoadReporter(self._report, lambda: self.door.count)
            self.door.on_change = self._reporter.changed
        described = ", ".join(f"{key} {value}" for key, value in engine.description().items())
        logger.info("%s is ready: %s", plan.model_name, described)

    def load(self) -> ApplicationLoad:
        return super().load() if self._reporter is None else self._reporter.load()

    async def close(self) -> None:
        if self._reporter is not None and self._link is not None:
            await self._reporter.close()
            self._link.leave.remote(replica_id())
        await super().close()

    async def _report(self, queue_length: int) -> ApplicationLoad:
        assert self._link is not None
        reply: ApplicationLoad = await self._link.report.remote(replica_id(), queue_length)
        return reply

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self)


class LinkReplica(ControllerLink):
    """The one replica of ControllerLink."""

    async def __del__(self) -> None:  # Ray Serve awaits destructors
        await self.close()


def replica_id() -> str:
    return serve.get_replica_context().replica_tag


def live_max_ongoing_requests(default: int) -> int:
    """`max_ongoing_requests` of this replica as it is now: the YAML overrides the builder's, and a
    redeployment may change it while the replica runs."""
    config = getattr(serve.get_replica_context(), "_deployment_config", None)
    return int(getattr(config, "max_ongoing_requests", default))


def load_replica_engine(config: AppConfig, plan: Plan, max_num_seqs: int) -> Engine:
    """The engine, on the device and the CPUs that Ray gave to this replica."""
    from models import load_engine

    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return load_engine(
        plan.model_path,
        plan.quant_path,
        config.precision,
        device=plan.device,
        device_map=config.device_map,
        dtype=config.dtype,
        num_threads=config.num_threads,
        cpus=max(1, int(assigned)),
        template=config.conv_mode,
        token_order=config.token_order,
        tinychat_prompt_rewrite=config.tinychat_prompt_rewrite,
        own_process=True,
        max_num_seqs=max_num_seqs,
        **config.engine_options(),
    )
