"""`/chat/completions` as VILA's own server has it (VILA b760c34, server.py).

Its answers' content is a list of parts, its chunks have neither roles nor finish reasons, and its
errors are one string. Its server answers every error with status 500, even those of a request;
here the statuses are those of /v1, since OpenAI's clients repeat what has failed with 500.

VILA's own client is OpenAI's package with a base address without /v1, so that a simple request may
be meant either way, and gets VILA's answer. One that asks for what VILA's server does not know is
OpenAI's, sent here by mistake, and gets the answer that it would get from /v1.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deployments import fields
from deployments.model_worker import ModelWorker
from deployments.openai.errors import ErrorReply
from deployments.openai.generation import Generation
from deployments.openai.response import Attended, Describe, error_response, nested, respond
from deployments.worker_api import read_params
from models.errors import InvalidRequest

DEFAULTS: dict[str, Any] = {"max_tokens": 512, "top_p": 0.9, "temperature": 0.2}
TAKEN = ("messages", "stream", *DEFAULTS)
ONLY_VILAS = ("num_beams", "use_cache")
FIELDS = ("model", *TAKEN, *ONLY_VILAS)
ROLES = ("user", "assistant")
OPENAIS_HEADER = "x-stainless-lang"
"""OpenAI's packages send it. Of an error that is one string they show only the status."""
QUANTISED = ("-4bit-awq", "-awq")


def vila_routes(worker: ModelWorker) -> APIRouter:
    """`/chat/completions` of one worker."""
    router = APIRouter(tags=["VILA"])

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """As VILA's own server answers."""
        describe = nested if OPENAIS_HEADER in request.headers else _describe
        try:
            body = await read_params(request, worker)
        except Exception as error:
            return error_response(error, describe)
        if _is_openais(body):
            return Attended(lambda: respond(worker.openai.chat(body)))
        return Attended(lambda: _answer(worker, body, describe))

    return router


async def _answer(worker: ModelWorker, body: Any, describe: Describe) -> Response:
    try:
        taken = _openai_body(worker, body)
        model = body.get("model") or worker.model_name
    except Exception as error:
        return error_response(error, describe)
    head = {"created": time.time(), "model": model}

    async def whole(generation: Generation) -> dict[str, Any]:
        answer = await generation.whole()
        text = answer["choices"][0]["message"]["content"].strip()
        message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return {
            "id": uuid.uuid4().hex, "object": "chat.completion", **head,
            "choices": [{"message": message}],
        }  # fmt: skip

    async def chunks(generation: Generation) -> AsyncGenerator[dict[str, Any] | None, None]:
        async with aclosing(generation.chunks()) as answer:
            async for chunk in answer:
                if chunk is None:
                    yield None
                    continue
                text = chunk["choices"][0]["delta"]["content"]
                if text:
                    yield {
                        "id": "0", "object": "chat.completion.chunk", **head,
                        "choices": [{"delta": {"content": text}}],
                    }  # fmt: skip

    return await respond(worker.openai.chat(taken), whole, chunks, describe)


def _is_openais(body: Any) -> bool:
    """Whether it has a field or a role that is unknown to VILA's server, and none of VILA's own."""
    if not isinstance(body, dict) or any(name in body for name in ONLY_VILAS):
        return False
    if any(value is not None and name not in FIELDS for name, value in body.items()):
        return True
    messages = body.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") not in ROLES for message in messages
    )


def _openai_body(worker: ModelWorker, body: Any) -> dict[str, Any]:
    body = fields.mapping("body", body)
    model = fields.text("model", body.get("model") or worker.model_name)
    if _bare(model) != _bare(worker.model_name):
        raise InvalidRequest(
            "model", f"{fields.show(model)} is not served here; {worker.model_name!r} is"
        )
    if body.get("num_beams") not in (None, 1):
        raise InvalidRequest("num_beams", "is not supported; leave it out, or set it to 1")
    given = {name: body[name] for name in TAKEN if body.get(name) is not None}
    return {**DEFAULTS, **given}


def _bare(model: str) -> str:
    """VILA's names, whichever way its quantised checkpoints are called."""
    name = model.lower()
    for ending in QUANTISED:
        name = name.removesuffix(ending)
    return name


def _describe(reply: ErrorReply) -> dict[str, Any]:
    return {"error": reply.message}
