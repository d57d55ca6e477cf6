"""A request's body: read within limits, and parsed whatever content type it claims."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from models.errors import InvalidRequest, RequestAborted

MAX_VALUES = 200_000
"""Bounds lists, objects and their members: 64 MB of `[[],[],...` would parse into gigabytes."""


class BodyTooLarge(InvalidRequest):
    """More bytes than are read."""


async def read_json(request: Request, *, max_bytes: int, timeout_s: float) -> Any:
    """
    Raises:
        InvalidRequest: too large (BodyTooLarge), too slow, or not JSON.
        RequestAborted: its sender went away.
    """
    try:
        body = await asyncio.wait_for(_read(request, max_bytes), timeout_s)
    except asyncio.TimeoutError:
        raise InvalidRequest("body", f"had not arrived after {timeout_s:g} s") from None
    except ClientDisconnect:
        raise RequestAborted("the client left before its request had arrived") from None
    return parse_json(body)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = BodyTooLarge("body", f"is larger than {max_bytes} bytes")
    announced = request.headers.get("content-length", "")[:20]  # int() refuses 5,000 digits
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """
    Raises:
        InvalidRequest: not JSON, or more of it than a request can need.
    """
    if not body.strip():
        raise InvalidRequest("body", "is empty; it must be a JSON object")
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise InvalidRequest("body", f"has more than {MAX_VALUES} values in it")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" (character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest("body", f"is not JSON{where}") from None
