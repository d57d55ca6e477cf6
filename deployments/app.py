"""What `serve_config.yaml` names: `import_path: deployments.app:build`."""

# No `from __future__ import annotations` here: Ray Serve looks at the annotation of `args` to know
# what to validate the YAML's `args:` with, and would find a string.

from ray import serve

from deployments.cluster import Cluster
from deployments.config import AppConfig
from deployments.plan import make_plan
from deployments.replica import ModelReplica

DEPLOYMENT_NAME = "ModelWorker"
GRACEFUL_SHUTDOWN_TIMEOUT_S = 600.0
"""Above the longest stream: a wait in the line, and the largest answer of a slow model."""


def build(args: AppConfig) -> serve.Application:
    """The application: a model worker that is its own HTTP ingress.

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
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    return deployment(serve.ingress()(ModelReplica)).bind(args, plan)
