"""OpenAI's routes, and those that vLLM has beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deployments.model_worker import ModelWorker
from deployments.openai.generation import Generation
from deployments.openai.response import Attended, error_response, respond
from deployments.worker_api import read_params


def openai_routes(worker: ModelWorker) -> APIRouter:
    """`/v1/*`, `/tokenize`, `/detokenize`, `/version`, `/load` of one worker."""
    router = APIRouter(tags=["OpenAI"])
    service = worker.openai

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, with pictures; whole, or streamed."""
        return await _generate(request, worker, service.chat)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """What follows a finished prompt; whole, or streamed."""
        return await _generate(request, worker, service.complete)

    @router.get("/models", include_in_schema=False)  # clients of VILA's base address, llama.cpp's
    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return service.models()

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The model that is served, by its name."""
        try:
            return JSONResponse(service.model(name))
        except Exception as error:
            return error_response(error)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a conversation."""
        return await _reply(request, worker, service.tokenize)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        return await _reply(request, worker, service.detokenize)

    @router.get("/version")
    async def get_version() -> dict[str, str]:
        """Of this server."""
        try:
            return {"version": version("tinychat-serve")}
        except PackageNotFoundError:  # a folder that was sent to the cluster, not installed
            return {"version": "unknown"}

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Requests running and waiting in this replica."""
        return {"server_load": worker.get_replica_count()}

    return router


async def _generate(
    request: Request, worker: ModelWorker, prepare: Callable[[object], Awaitable[Generation]]
) -> Response:
    try:
        body = await read_params(request, worker)
    except Exception as error:
        return error_response(error)
    return Attended(lambda: respond(prepare(body)))


async def _reply(
    request: Request,
    worker: ModelWorker,
    answer: Callable[[object], Awaitable[dict[str, Any]]],
) -> Response:
    try:
        return JSONResponse(await answer(await read_params(request, worker)))
    except Exception as error:
        return error_response(error)
