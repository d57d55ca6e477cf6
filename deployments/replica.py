"""What runs on Ray: ModelReplica, a ModelWorker that is its own HTTP ingress, and LinkReplica.

A chunk that crosses a DeploymentHandle costs more than the token in it, so the class that holds
the model also answers HTTP. The same methods serve DeploymentHandle callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client, _get_serve_request_context
from ray.serve.handle import DeploymentHandle

from deployments.access_log import open_access_log
from deployments.config import AppConfig
from deployments.controller_link import ControllerLink
from deployments.door import Door, shrink
from deployments.http_app import build_http_app
from deployments.load_board import ApplicationLoad
from deployments.load_reporter import LoadReporter
from deployments.metrics import ModelMetrics, keep_updated, ray_record
from deployments.model_worker import ModelWorker
from deployments.plan import Plan
from deployments.start_up import start_up_lines

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
        # Only now: the first answer was nobody's request.
        metrics = ModelMetrics(engine, partial(ray_record, model_name=plan.model_name))
        self._metrics_task = asyncio.create_task(keep_updated(metrics))
        write, access_log = open_access_log(config.access_log, plan.model_name)
        self.requests.listeners += [metrics.note, write]
        loop = asyncio.get_running_loop()
        for line in start_up_lines(
            plan.model_name,
            engine.description(),
            address=await loop.run_in_executor(None, served_at),
            max_waiting=max_waiting,
            access_log=access_log,
            metrics=await loop.run_in_executor(None, metrics_at),
        ):
            logger.info(line)

    # ---- what handles call, logged as HTTP's requests are ------------------------------------

    async def generate_stream(self, params: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        answer = super().generate_stream(params)
        del params  # megabytes of base64, not to be held until the answer's end
        logged = self.requests.streamed("generate_stream", serve_request_id, answer)
        async with aclosing(logged):
            async for record in logged:
                yield record

    async def generate_stream_gate(self, params: Any) -> AsyncGenerator[bytes, None]:
        answer = super().generate_stream_gate(params)
        del params
        logged = self.requests.streamed("generate_stream_gate", serve_request_id, answer)
        async with aclosing(logged):
            async for part in logged:
                yield part

    async def generate(
        self, params: dict[str, Any] | None = None, **more: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        answer = super().generate(params, **more)
        del params, more
        logged = self.requests.streamed("generate", serve_request_id, answer)
        async with aclosing(logged):
            async for piece in logged:
                yield piece

    async def chat(
        self, request: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
        answer = super().chat(request)
        del request
        return await self.requests.called("chat", serve_request_id, answer)

    # ------------------------------------------------------------------------------------------

    def load(self) -> ApplicationLoad:
        return super().load() if self._reporter is None else self._reporter.load()

    async def close(self) -> None:
        self._metrics_task.cancel()
        if self._reporter is not None and self._link is not None:
            await self._reporter.close()
            self._link.leave.remote(replica_id())
        await super().close()

    async def _report(self, queue_length: int) -> ApplicationLoad:
        assert self._link is not None
        reply: ApplicationLoad = await self._link.report.remote(replica_id(), queue_length)
        return reply

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self, sends_request_id=False)


class LinkReplica(ControllerLink):
    """The one replica of ControllerLink."""

    async def __del__(self) -> None:  # Ray Serve awaits destructors
        await self.close()


def replica_id() -> str:
    return serve.get_replica_context().replica_tag


def serve_request_id() -> str:
    """Of the call through a handle that this task answers."""
    return str(_get_serve_request_context().request_id)


def served_at() -> str | None:
    """The application's address on this node, where Ray Serve tells it."""
    try:
        client = _get_global_client()
        if client is None:
            return None
        details = client.get_serve_details()
        http = details["http_options"]
        prefix = details["applications"][serve.get_replica_context().app_name]["route_prefix"]
        return f"http://{http['host']}:{http['port']}{prefix}"
    except Exception as error:  # no interface that Ray promises to keep
        logger.debug("the application's address is not to be had: %s", type(error).__name__)
        return None


def metrics_at() -> str | None:
    """Where Ray's exporter of this node serves its metrics."""
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here and node["MetricsExportPort"] > 0:
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None


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
