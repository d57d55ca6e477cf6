"""What can be told to be wrong with a configuration before Ray starts: one line each, at once.

    python -m deployments.preflight serve_config.yaml && serve run serve_config.yaml

Ray Serve tells the same, half a minute later, between the lines and stack traces of several
processes; keys outside of `args:` that it does not know it ignores. Status 1 if something is
wrong. `make serve` looks first.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.app import DEPLOYMENT_NAME, LINK_NAME
from deployments.cluster import Cluster
from deployments.config import AppConfig
from deployments.model_source import resolve_model
from deployments.plan import make_plan
from deployments.serve_keys import items, unknown_deployments, unread_keys
from models.command_line import HelpFormatter
from models.errors import ConfigurationError

IMPORT_PATH = "deployments.app:build"
SERVE_HOST, SERVE_PORT = "0.0.0.0", 8000
"""Ray Serve's defaults in a YAML file."""


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the YAML file that `serve run` is to read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    except UnicodeDecodeError as error:
        yield f"{path}: is not text in UTF-8: {error}"
        return
    except yaml.YAMLError as error:
        yield f"{path}: is not YAML: {' '.join(str(error).split())}"
        return
    if not isinstance(config, dict):
        yield f"{path}: must be a mapping, with `applications:`"
        return
    yield from (f"{path}: {problem}" for problem in unread_keys(config))
    on_a_cluster = "RAY_ADDRESS" in os.environ
    for application in items(config.get("applications")):
        if application.get("import_path") == IMPORT_PATH:
            for problem in args_problems(application.get("args") or {}, on_a_cluster=on_a_cluster):
                yield f"{path}: args: {problem}"
            for problem in unknown_deployments(application, (DEPLOYMENT_NAME, LINK_NAME)):
                yield f"{path}: {problem}"
    http = config.get("http_options")
    if not isinstance(http, dict):
        http = {}
    host, port = http.get("host", SERVE_HOST), http.get("port", SERVE_PORT)
    if not on_a_cluster and is_taken(host, port):
        yield (
            f"port {port} is taken: is another server running on {host}? Stop it, or change "
            f"http_options: port in {path}"
        )


def args_problems(args: Any, *, on_a_cluster: bool) -> Iterator[str]:
    """What is wrong with the application's `args:`, or with the checkpoint that they name."""
    try:
        config = AppConfig.model_validate(args)
    except ValidationError as error:
        yield from validation_problems(error)
        return
    try:
        if on_a_cluster:  # whose processors and folders are not this machine's
            resolve_model(config.model_path, elsewhere=True)
        else:
            make_plan(config, Cluster.look())
    except ConfigurationError as error:
        yield str(error)


def validation_problems(error: ValidationError) -> Iterator[str]:
    """pydantic's errors, a line each."""
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        text = problem["msg"].removeprefix("Value error, ")
        yield f"{where}: {text}" if where else text


def is_taken(host: str, port: int) -> bool:
    """Whether something listens there already."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, TypeError):  # no address; Ray Serve says so
        return False
    for family, *_, address in addresses:
        try:
            socket.create_server(address[:2], family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.preflight", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("config", type=Path, help="the YAML file that `serve run` is to read")
    found = list(problems(parser.parse_args(arguments).config))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
