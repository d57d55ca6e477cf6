"""Kinds of errors by the names that clients, logs and metrics know them by."""

from __future__ import annotations

from models.errors import (
    EngineDead,
    EngineFault,
    EngineOverloaded,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
    TinyChatError,
)

ERROR_TYPES: dict[type[TinyChatError], str] = {
    InvalidRequest: "invalid_request",
    EngineOverloaded: "overloaded",
    RequestTimeout: "timeout",
    RequestAborted: "aborted",
    EngineFault: "engine",
    EngineDead: "engine_dead",
}
INTERNAL = "internal"
"""An error that nobody meant to raise."""


def error_type(error: BaseException) -> str:
    """The first that fits; INTERNAL where none does."""
    return next((name for kind, name in ERROR_TYPES.items() if isinstance(error, kind)), INTERNAL)
