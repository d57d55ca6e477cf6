"""The worker protocol over HTTP, as TinyChat's and LLaVA's controllers and clients speak it.

`POST /worker_generate_stream` answers with status 200 whatever happens, and says what went wrong
in a record: its clients never look at the status, and proxies between them do not pass it on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.body import read_json
from deployments.model_worker import ModelWorker
from deployments.records import error_record, frame
from models.errors import TinyChatError

HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}
"""The worker protocol's streams have no content type, as upstream's; so browsers must not guess
one, nor may proxies hold it back."""


class RecordStream(StreamingResponse):
    """Closes its records when the response ends, by whatever way, instead of when the garbage
    collector comes by: that is what frees the request's place and blocks at once."""

    def __init__(self, records: AsyncIterator[bytes], media_type: str | None = None) -> None:
        super().__init__(records, headers=HEADERS, media_type=media_type)
        self._records: Any = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            return
        finally:
            await self._records.aclose()


async def read_params(request: Request, worker: ModelWorker) -> Any:
    """The body's JSON.

    Raises:
        EngineOverloaded: too many bodies are on their way.
        InvalidRequest: the body cannot be read as JSON.
    """
    with worker.door.upload():
        return await read_json(
            request,
            max_bytes=worker.config.max_body_bytes,
            timeout_s=worker.config.body_timeout_s,
        )


def worker_routes(worker: ModelWorker) -> APIRouter:
    """`/worker_generate_stream` and `/worker_get_status` of one worker."""
    router = APIRouter(tags=["worker"])

    @router.post("/worker_generate_stream")
    async def generate_stream(request: Request) -> RecordStream:
        """Cumulative text in null-terminated JSON records."""
        try:
            params = await read_params(request, worker)
        except TinyChatError as error:
            return RecordStream(_only(frame(error_record(error))))
        return RecordStream(worker.generate_stream_gate(params))

    @router.post("/worker_get_status")
    async def get_status() -> dict[str, Any]:
        """Name, speed and queue length, for controllers."""
        return worker.get_status()

    return router


async def _only(record: bytes) -> AsyncIterator[bytes]:
    yield record
