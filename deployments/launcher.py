"""`python -m deployments`: the worker with TinyChat's flags, drained when it is told to stop.

Ray is started for this application alone, without its dashboard; where RAY_ADDRESS names a
cluster, that is used. Unlike `serve run`, SIGTERM and SIGINT first close the door, then let
running answers finish, leave the controller, and end with status 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.app import GRACEFUL_SHUTDOWN_TIMEOUT_S, build
from deployments.cluster import Cluster
from deployments.config import AppConfig
from deployments.plan import make_plan
from deployments.preflight import is_taken, validation_problems
from models.command_line import HelpFormatter
from models.errors import TinyChatError

logger = logging.getLogger("ray.serve")

APP_NAME = "tinychat"
OBJECT_STORE_BYTES = 100 << 20
"""Nothing large goes through it: requests and answers stay in the replica that gets them."""
POLL_S = 0.2
CONTROL_CALL_TIMEOUT_S = 10.0

DESCRIPTION = """\
Serve one LLaVA or VILA model on this machine, with the flags of TinyChat's model_worker_new:
TinyChat's worker protocol, OpenAI's API under /v1, and a page to try it at /. Starts a Ray of its
own (or uses the cluster that RAY_ADDRESS names). SIGTERM or Ctrl-C lets running answers finish; a
second one does not wait for them."""
EXAMPLES = """\
examples:
  # the demo model, without a controller, on http://localhost:21002
  python -m deployments --model-path models/demo/checkpoint/llava-demo --no-register
  # as TinyChat's documentation has it; flags may be abbreviated
  python -m deployments --host 0.0.0.0 --port 40000 --controller http://localhost:10000 \\
      --worker http://localhost:40000 --model-path /data/VILA1.5-3b-AWQ

Every other setting has its default (docs/configuration.md); to change one, use `serve run` with
serve_config.yaml, which also has replicas and autoscaling."""


def build_parser() -> argparse.ArgumentParser:
    """TinyChat's worker flags. They may be abbreviated (`--controller`, `--worker`, `--quant`), as
    its documentation does, so no flag may be added here that begins like another."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--host", default="localhost", help="address to listen on; 0.0.0.0: from other machines too"
    )
    parser.add_argument("--port", type=int, default=21002, help="TCP port to listen on")
    parser.add_argument(
        "--worker-address",
        default="http://localhost:21002",
        metavar="URL",
        help="where the controller's clients reach this worker",
    )
    parser.add_argument(
        "--controller-address",
        default="http://localhost:21001",
        metavar="URL",
        help="the LLaVA, TinyChat or FastChat controller to register with",
    )
    parser.add_argument(
        "--model-type",
        default="LLaMa",
        help="TinyChat's; only LLaMa is accepted, the architecture is read from the checkpoint",
    )
    parser.add_argument(
        "--model-path", required=True, help="the checkpoint: a folder, or a Hugging Face Hub id"
    )
    parser.add_argument(
        "--model-name",
        help="name to register, to which W4A16 appends -4bit-AWQ; default: the last part of "
        "--model-path",
    )
    parser.add_argument(
        "--quant-path",
        help="the AWQ weights, a file or a folder; default: found inside --model-path",
    )
    parser.add_argument(
        "--precision",
        default="W4A16",
        choices=("W4A16", "W16A16"),
        help="W4A16 reads AWQ 4-bit weights, W16A16 the 16-bit ones",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cuda or cpu"
    )
    parser.add_argument(
        "--multi-modal", action="store_true", help="TinyChat's; taken and ignored: always so"
    )
    parser.add_argument(
        "--limit-model-concurrency",
        type=int,
        default=5,
        metavar="N",
        help="requests that run at a time; 64 more may wait",
    )
    parser.add_argument(
        "--stream-interval", type=int, default=1, metavar="N", help="TinyChat's; taken and ignored"
    )
    parser.add_argument(
        "--no-register", action="store_true", help="serve without telling any controller"
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=None,
        metavar="PORT",
        help="of Ray's metrics exporter; default: a free one",
    )
    return parser


def app_config(options: argparse.Namespace) -> AppConfig:
    """
    Raises:
        ValidationError: a flag's value is none that it can have.
    """
    return AppConfig(
        model_path=options.model_path,
        quant_path=options.quant_path,
        precision=options.precision,
        model_name=options.model_name,
        model_type=options.model_type,
        device=options.device,
        limit_model_concurrency=options.limit_model_concurrency,
        controller_addr=options.controller_address,
        worker_addr=options.worker_address,
        no_register=options.no_register,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        config = app_config(options)
    except ValidationError as error:
        for problem in validation_problems(error):
            print(problem, file=sys.stderr)
        return 2
    if "RAY_ADDRESS" not in os.environ and (reason := problem_here(config, options)):
        print(reason, file=sys.stderr)
        return 1
    start_ray(options.metrics_port)
    stop = StopSignal()  # after Ray, which has a handler of its own
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        handle = serve.run(build(config), name=APP_NAME, route_prefix="/")
    except TinyChatError as error:
        print(error, file=sys.stderr)
        return shut_down(1)
    except RuntimeError as error:  # the deployment failed; Serve's message has the reason
        print(error, file=sys.stderr)
        return shut_down(1)
    print(f"Serving on http://{options.host}:{options.port}; SIGTERM or Ctrl-C drains.", flush=True)
    stop.wait()
    print("Draining: no new requests, running ones finish.", flush=True)
    drain(handle, stop)
    return shut_down(0)


class StopSignal:
    """The first SIGTERM or SIGINT is noted; a second one ends the waiting too."""

    def __init__(self) -> None:
        self._received = 0
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    @property
    def insisted(self) -> bool:
        return self._received > 1

    def wait(self) -> None:
        while not self._event.wait(timeout=3600):
            pass

    def _receive(self, *_: Any) -> None:
        self._received += 1
        self._event.set()


def problem_here(config: AppConfig, options: argparse.Namespace) -> str | None:
    """What would go wrong on this machine. Once Ray has started, its lines would hide it."""
    if is_taken(options.host, options.port):
        return (
            f"port {options.port} is taken: is another worker running on {options.host}? Stop it, "
            "or give another --port (and --worker-address)"
        )
    try:
        make_plan(config, Cluster.look())
    except TinyChatError as error:
        return str(error)
    return None


def start_ray(metrics_port: int | None) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, namespace="serve")
        return
    ray.init(
        address="local",
        namespace="serve",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _metrics_export_port=metrics_port,
    )


def drain(handle: DeploymentHandle[Any], stop: StopSignal) -> None:
    """Closes the doors of all replicas and waits until they are empty, or until a second signal."""
    handle.broadcast("drain").results(timeout_s=CONTROL_CALL_TIMEOUT_S)
    deadline = time.monotonic() + GRACEFUL_SHUTDOWN_TIMEOUT_S
    while not stop.insisted and time.monotonic() < deadline:
        inside = handle.broadcast("get_replica_count").results(timeout_s=CONTROL_CALL_TIMEOUT_S)
        if not any(inside):
            return
        time.sleep(POLL_S)


def shut_down(status: int) -> int:
    """Ends the application, Serve and Ray, in this order, so that destructors run."""
    if APP_NAME in serve.status().applications:
        serve.delete(APP_NAME)
    serve.shutdown()
    ray.shutdown()
    return status
