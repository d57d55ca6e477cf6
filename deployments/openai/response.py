"""Answers of the OpenAI routes over HTTP: a status, then JSON or server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from deployments.openai.errors import ErrorReply
from deployments.openai.generation import Generation
from deployments.worker_api import RecordStream

DONE = b"data: [DONE]\n\n"
SIGN_OF_LIFE = b": still here\n\n"
"""A comment, which clients pass over."""

Describe = Callable[[ErrorReply], dict[str, Any]]
"""An error's body, in the shape of the route."""


def nested(reply: ErrorReply) -> dict[str, Any]:
    """vLLM's shape."""
    return reply.body


def error_response(error: Exception, describe: Describe = nested) -> JSONResponse:
    reply = ErrorReply.of(error)
    return JSONResponse(describe(reply), reply.status, reply.headers)


class Attended(Response):
    """Finds its answer while it watches for its client to leave, in whichever phase; then it gives
    the answer up, and with it the request's places and blocks."""

    def __init__(self, respond: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, scope: Scope, send: Send) -> None:
        response = await self._respond()
        # Sending to one who has left fails in servers of the newer ASGI specification.
        with suppress(ClientDisconnect, OSError):
            await response(scope, _nothing, send)


async def respond(
    prepare: Awaitable[Generation],
    whole: Callable[[Generation], Awaitable[dict[str, Any]]] = Generation.whole,
    chunks: Callable[[Generation], AsyncGenerator[dict[str, Any] | None, None]] = Generation.chunks,
    describe: Describe = nested,
) -> Response:
    """A generation's response; what fails before the first chunk has a status of its own."""
    try:
        generation = await prepare
        if not generation.options.stream:
            answer = await whole(generation)
            if generation.options.params.prompt_logprobs is None:
                return JSONResponse(answer)
            return await asyncio.to_thread(JSONResponse, answer)  # megabytes, perhaps
        events = _events(chunks(generation), describe)
        first = await anext(events)
    except Exception as error:
        return error_response(error, describe)
    return RecordStream(_Peeked(first, events), media_type="text/event-stream")


async def _events(
    chunks: AsyncGenerator[dict[str, Any] | None, None], describe: Describe
) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                begun = True
                yield SIGN_OF_LIFE if chunk is None else event(chunk)
    except Exception as error:
        if not begun:
            raise
        yield event(describe(ErrorReply.of(error)))
    yield DONE


def event(data: dict[str, Any]) -> bytes:
    """In ASCII: some clients take U+2028 in a text for the end of a line."""
    return f"data: {json.dumps(data)}\n\n".encode("ascii")


class _Peeked:
    """An iterator of which the first item has been taken already."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first: bytes | None = first
        self._rest = rest

    def __aiter__(self) -> _Peeked:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, None
        return await anext(self._rest) if first is None else first

    async def aclose(self) -> None:
        await self._rest.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    """For responses that listen themselves; the request's messages have one listener already."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")
