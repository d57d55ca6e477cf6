"""What `serve_config.yaml` names: `import_path: deployments.app:build`."""

# No `from __future__ import annotations` here: Ray Serve looks at the annotation of `args` to know
# what to validate the YAML's `args:` with, and would find a string.

import uuid

from ray import serve

from deployments.cluster import Cluster
from deployments.config import AppConfig
from deployments.controller_link import LinkSettings
from deployments.plan import make_plan
from deployments.replica import LinkReplica, ModelReplica

DEPLOYMENT_NAME = "ModelWorker"
GRACEFUL_SHUTDOWN_TIMEOUT_S = 600.0
"""Above the longest stream: a wait in the line, and the largest answer of a slow model."""
LINK_NAME = "ControllerLink"
LINK_MAX_ONGOING = 1000
"""Reports are short, and none of a large application's replicas may wait for another's."""
LINK_SHUTDOWN_TIMEOUT_S = 30.0


def build(args: AppConfig) -> serve.Application:
    """The application: a model worker that is its own HTTP ingress, and, unless it should register
    nowhere, the link to its controller.

    Raises:
        ConfigurationError: `args` cannot work on this cluster, or with these files.
    """
    plan = make_plan(args, Cluster.look())
    deployment = serve.deployment(
        name=DEPLOYMENT_NAME,
        ray_actor_options={"num_cpus": plan.num_cpus, "num_gpus": plan.num_gpus},
        max_ongoing_requests=plan.max_ongoing_requests,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        # Three checks in a row must fail before Serve replaces a replica whose engine has died.
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    model = deployment(serve.ingress()(ModelReplica))
    if args.no_register:
        return model.bind(args, plan)
    link = serve.deployment(
        name=LINK_NAME,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # a line a second for each replica
        max_ongoing_requests=LINK_MAX_ONGOING,
        graceful_shutdown_timeout_s=LINK_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
    )
    settings = LinkSettings(
        controller_addr=args.controller_addr,
        worker_addr=args.worker_addr,
        worker_id=args.worker_id or uuid.uuid4().hex[:8],
        model_name=plan.model_name,
        heartbeat_interval_s=args.heartbeat_interval_s,
        refresh_on_shutdown=args.refresh_on_shutdown,
    )
    return model.bind(args, plan, link(LinkReplica).bind(settings, DEPLOYMENT_NAME))
