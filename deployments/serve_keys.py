"""Keys of a Serve YAML that nothing would read: Ray Serve passes over unknown ones in silence."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from deployments.config import AppConfig


def unread_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each key that Ray Serve's schema of the file does not know.

    What is under `args:` is the application's, and not looked at.

    Args:
        config: the whole file, as `serve run` and `serve deploy` read it.
    """
    yield from _unread(config, ServeDeploySchema, "the top of the file")
    yield from _unread(config.get("http_options"), HTTPOptionsSchema, "http_options:")
    for application in items(config.get("applications")):
        yield from _unread(application, ServeApplicationSchema, "applications:")
        for deployment in items(application.get("deployments")):
            yield from _unread(deployment, DeploymentSchema, "deployments:")
            for key, schema in (
                ("autoscaling_config", AutoscalingConfig),
                ("ray_actor_options", RayActorOptionsSchema),
            ):
                yield from _unread(deployment.get(key), schema, f"{key}:")


def unknown_deployments(application: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """One sentence for each entry of `deployments:` that sets options of no deployment."""
    for deployment in items(application.get("deployments")):
        if (name := str(deployment.get("name"))) not in known:
            yield f"deployments: there is no {name!r}; known: {', '.join(known)}"


def items(values: Any) -> Iterator[Mapping[str, Any]]:
    """The mappings of a list; of what is none, nothing. Ray Serve says what is wrong with it."""
    if isinstance(values, list):
        yield from (value for value in values if isinstance(value, Mapping))


def _unread(values: Any, schema: type[BaseModel], where: str) -> Iterator[str]:
    if not isinstance(values, Mapping):
        return  # Ray Serve says what is wrong with it
    known = {alias for name, field in schema.model_fields.items() for alias in (name, field.alias)}
    for key in map(str, values):
        if key not in known:
            yield f"{where} {_hint(key, sorted(filter(None, known)))}"


def _hint(key: str, known: list[str]) -> str:
    if key in AppConfig.model_fields:
        return f"{key!r} belongs under `args:`"
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {key!r}, which Ray Serve would ignore; {hint}"
