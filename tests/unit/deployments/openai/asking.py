"""Requests to the OpenAI routes of a worker, and what comes back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from deployments.http_app import build_http_app
from deployments.model_worker import ModelWorker
from tests.unit.deployments.harness import (
    NEVER_S,
    RED_PICTURE,
    Connection,
    ask,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
DATA_URL = f"data:image/png;base64,{RED_PICTURE}"


async def forever() -> None:
    await asyncio.sleep(NEVER_S)


def image(url: Any = DATA_URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def about(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


async def post(worker: ModelWorker, path: str = CHAT, **body: Any) -> Connection:
    body = body if path != CHAT or "messages" in body else {"messages": HI, **body}
    return await ask(build_http_app(worker), path, json.dumps(body).encode())


async def refused(worker: ModelWorker, status: int, path: str = CHAT, **body: Any) -> Any:
    """The error, in vLLM's form."""
    answer = await post(worker, path, **body)
    assert answer.status == status, answer.body
    (error,) = answer.json.values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "0x" not in error["message"]
    assert not any(folder in error["message"] for folder in ("/home", "/etc", "/tmp"))
    assert worker.get_queue_length() == 0
    return error


def texts(events: list[dict[str, Any]], index: int = 0) -> str:
    """What a client puts together."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)
