"""The worker protocol's records: JSON objects, each followed by a zero byte.

`text` is cumulative and begins with the caller's prompt unless it asked for `echo: false`.
`error_code` is 0; a record with another one is the last of its stream, and its `text` is shown to
the user. TinyChat's and LLaVA's workers know one code, 1, for everything that goes wrong in a
worker, and their clients only tell it from 0; so it stays 1, and `error_type` tells causes apart.
`usage` and `finish_reason` are FastChat's.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from deployments.error_types import INTERNAL, error_type
from deployments.request_log import current_entry
from models import Usage
from models.errors import InvalidRequest

logger = logging.getLogger("ray.serve")

ERROR_CODE = 1


def text_record(text: str, usage: Usage, finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "text": text,
        "error_code": 0,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "finish_reason": finish_reason,
    }


def error_record(error: Exception) -> dict[str, Any]:
    """What the client is told. The request's log is told, too."""
    current_entry().note_error(error)
    kind = error_type(error)
    if kind == INTERNAL:
        text = f"internal error: {log_unexpected(error)}"
        return {"text": text, "error_code": ERROR_CODE, "error_type": kind}
    record = {"text": str(error), "error_code": ERROR_CODE, "error_type": kind}
    if isinstance(error, InvalidRequest):
        record["error_field"] = error.field
    return record


def log_unexpected(error: Exception) -> str:
    """What a client is told of an error that nobody meant to raise. It is logged and not
    described: its text may hold paths, addresses or another user's words."""
    reference = uuid.uuid4().hex[:12]
    logger.error("request failed, reference %s", reference, exc_info=error)
    return f"the request could not be answered; the server's log has the cause under {reference}"


def frame(record: dict[str, Any]) -> bytes:
    """One record on the wire."""
    return json.dumps(record).encode("ascii") + b"\0"
