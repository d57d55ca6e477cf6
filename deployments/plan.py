"""AppConfig and the cluster -> what to ask Ray for, or why it cannot work.

Whatever can be found wrong before a replica starts is found here: an error in the builder is one
message, one in a replica is a stack trace that Ray Serve prints at every retry.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deployments.cluster import Cluster
from deployments.config import AppConfig
from deployments.door import max_ongoing_requests
from deployments.model_source import registered_name, resolve_model, resolve_quant
from models.errors import ConfigurationError, TinyChatError

if TYPE_CHECKING:
    from models.checkpoints import Checkpoint

logger = logging.getLogger("ray.serve")

MAX_NUM_SEQS = {"cuda": 64, "cpu": 8}
LARGEST_NODE = 8
"""GPUs of a node that may still come."""


@dataclass(frozen=True)
class Plan:
    """What a replica of the application is.

    Attributes:
        model_path: an absolute path, or a Hub id.
        model_name: as registered.
        num_cpus, num_gpus: what Ray is asked for, for each replica. `ray_actor_options` in the
            YAML's `deployments:` section overrides them.
        max_ongoing_requests: Serve's limit for each replica; may be overridden there too.
    """

    model_path: str
    quant_path: str | None
    model_name: str
    device: Literal["cuda", "cpu"]
    num_cpus: int
    num_gpus: int
    max_num_seqs: int
    max_waiting: int
    max_ongoing_requests: int


def make_plan(config: AppConfig, cluster: Cluster) -> Plan:
    """
    Raises:
        ConfigurationError: the configuration cannot work on this cluster, or with these files.
    """
    device = choose_device(config, cluster)
    model_path = resolve_model(config.model_path, elsewhere=cluster.grows)
    quant_path = resolve_quant(config.quant_path)
    checkpoint = None
    if Path(model_path).is_dir():
        checkpoint = check_checkpoint(config, model_path, quant_path)
    num_gpus = gpus_per_replica(config, cluster, checkpoint) if device == "cuda" else 0
    max_num_seqs = config.running_limit or MAX_NUM_SEQS[device]
    return Plan(
        model_path=model_path,
        quant_path=quant_path,
        model_name=registered_name(config.model_path, config.model_name, config.precision),
        device=device,
        num_cpus=cluster.cpus_per_gpu * num_gpus if device == "cuda" else cluster.cpus,
        num_gpus=num_gpus,
        max_num_seqs=max_num_seqs,
        max_waiting=config.max_waiting,
        max_ongoing_requests=max_ongoing_requests(max_num_seqs, config.max_waiting),
    )


def choose_device(config: AppConfig, cluster: Cluster) -> Literal["cuda", "cpu"]:
    """
    Raises:
        ConfigurationError: a GPU is asked for where there is none and none can come.
    """
    if config.device == "cpu" or (config.device == "auto" and not cluster.has_gpu):
        if config.device_map == "balanced":
            raise ConfigurationError(
                "device_map is balanced, which spreads a model over several GPUs, but the device "
                "is a CPU; use device: cuda, or device_map: auto"
            )
        return "cpu"
    if not cluster.has_gpu:
        if not cluster.grows:
            raise ConfigurationError(
                "device is cuda, but this machine has no GPU that Ray can see, and it is the only "
                "node; use device: cpu or auto, or add a node with a GPU to the cluster first"
            )
        logger.warning(
            "device is cuda and no node has a GPU yet: the cluster is asked for one (num_gpus: 1), "
            "and replicas wait until it has come. Nothing is served until then."
        )
    return "cuda"


def gpus_per_replica(config: AppConfig, cluster: Cluster, checkpoint: Checkpoint | None) -> int:
    """As many as its model needs, where that can be known here: the files must be on this machine,
    and so must a GPU be like those of the nodes.

    Raises:
        ConfigurationError: no node has as many.
    """
    most = max(cluster.gpus, LARGEST_NODE if cluster.grows else 1)
    if config.device_map == "balanced":
        if most < 2:
            raise ConfigurationError(
                "device_map is balanced, which spreads a model over several GPUs, but this "
                "machine, the only node, has one; use device_map: auto"
            )
        return max(2, cluster.gpus)
    if config.device_map == "single" or most < 2 or checkpoint is None or not cluster.gpu_bytes:
        return 1
    # Only now, since it imports torch.
    from models.device_map import gpus_needed
    from models.engine.options import EngineOptions

    options = EngineOptions(**config.engine_options())
    try:
        count = gpus_needed(checkpoint, config.dtype, options, cluster.gpu_bytes, most)
    except TinyChatError as error:
        raise ConfigurationError(str(error)) from error
    if count > 1:
        logger.info("the model is larger than one GPU: each replica takes %d", count)
    return count


def check_checkpoint(config: AppConfig, model_path: str, quant_path: str | None) -> Checkpoint:
    """Opens the checkpoint's headers: no weights are read.

    Raises:
        ConfigurationError: it cannot be served as the configuration says.
    """
    # Only now, since it imports torch.
    from models.checkpoints import open_checkpoint

    try:
        return open_checkpoint(
            model_path, quant_path, config.precision,
            template=config.conv_mode, token_order=config.token_order,
        )  # fmt: skip
    except TinyChatError as error:
        raise ConfigurationError(str(error)) from error
