"""Errors as OpenAI's clients take them, in vLLM's nested form and with its status codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deployments.body import BodyTooLarge
from deployments.image_fetcher import PictureHostFailed, PictureNotFetched
from deployments.records import log_unexpected
from deployments.request_log import current_entry
from models.errors import (
    EngineDead,
    EngineFault,
    EngineOverloaded,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
)

RETRY_AFTER_S = 1


class UnknownModel(InvalidRequest):
    """The request is for a model that is not served here."""


KINDS: dict[type[Exception], tuple[int, str]] = {
    UnknownModel: (404, "NotFoundError"),
    BodyTooLarge: (413, "BadRequestError"),
    PictureNotFetched: (422, "UnprocessableEntityError"),
    PictureHostFailed: (502, "BadGatewayError"),
    InvalidRequest: (400, "BadRequestError"),
    EngineOverloaded: (503, "ServiceUnavailableError"),
    RequestTimeout: (503, "ServiceUnavailableError"),
    RequestAborted: (503, "ServiceUnavailableError"),
    EngineDead: (503, "ServiceUnavailableError"),
    EngineFault: (500, "InternalServerError"),
}
"""HTTP status and vLLM's type; the first that fits counts."""


@dataclass(frozen=True)
class ErrorReply:
    """What a client is told of an error, whichever shape it is then given."""

    status: int
    kind: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception) -> ErrorReply:
        """The request's log is told, too."""
        current_entry().note_error(error)
        for type_, (status, kind) in KINDS.items():
            if isinstance(error, type_):
                param = error.field if isinstance(error, InvalidRequest) else None
                headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
                return cls(status, kind, str(error), param, headers)
        return cls(500, "InternalServerError", log_unexpected(error))

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }
