"""The FastAPI application in front of one ModelWorker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from deployments.fastchat_api import fastchat_routes
from deployments.logged_app import LoggedApp
from deployments.model_worker import ModelWorker
from deployments.openai.api import openai_routes
from deployments.playground import accepts_html, index_page, playground_routes
from deployments.vila_api import vila_routes
from deployments.worker_api import worker_routes
from models.errors import EngineDead


def build_http_app(worker: ModelWorker, *, sends_request_id: bool = True) -> FastAPI:
    """The routes of `worker`; when the application shuts down, so does the worker.

    Args:
        sends_request_id: as `x-request-id` in every response; Ray Serve's proxy does it itself.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await worker.close()

    app = FastAPI(
        title="tinychat-serve",
        description=f"{worker.model_name}, behind TinyChat's worker protocol and OpenAI's API.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )

    @app.get("/", response_model=None)
    async def index(request: Request) -> Response | dict[str, Any]:
        """What is served here; browsers get the playground."""
        if accepts_html(request):
            return index_page(request)
        return {
            "service": "tinychat-serve",
            "model": worker.model_name,
            "routes": {
                "POST /worker_generate_stream": "answers, in null-terminated JSON records",
                "POST /worker_get_status": "model, speed, queue length",
                "POST /worker_generate": "the whole answer as one JSON object (FastChat)",
                "POST /count_token": "how many tokens a prompt has (FastChat)",
                "POST /worker_get_conv_template": "the model's conversation template (FastChat)",
                "POST /model_details": "the context's length (FastChat)",
                "POST /v1/chat/completions": "conversations with pictures (OpenAI, vLLM)",
                "POST /v1/completions": "finished prompts (OpenAI, vLLM)",
                "GET /v1/models": "the model (OpenAI)",
                "POST /tokenize": "the tokens of a text (vLLM)",
                "POST /detokenize": "the text of tokens (vLLM)",
                "POST /chat/completions": "conversations with pictures, in VILA's shape",
                "GET /version": "of this server",
                "GET /load": "requests running and waiting",
                "GET /health": "200 while requests are answered; /ping is the same",
                "GET /openapi.json": "the description of these routes",
            },
        }

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> JSONResponse:
        """200 while requests are answered, else 503."""
        if worker.door.is_closed:
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            worker.check_health()
        except EngineDead as error:
            return JSONResponse({"status": "dead", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ok"})

    app.add_middleware(LoggedApp, requests=worker.requests, sends_request_id=sends_request_id)
    app.include_router(worker_routes(worker))
    app.include_router(fastchat_routes(worker))
    app.include_router(openai_routes(worker))
    app.include_router(vila_routes(worker))
    app.include_router(playground_routes())
    return app
