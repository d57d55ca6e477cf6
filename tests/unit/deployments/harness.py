"""A ModelWorker around an engine that says what the test tells it to: no model, no Ray."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI
from PIL import Image

from deployments.config import AppConfig
from deployments.door import Door
from deployments.model_worker import ModelWorker
from models import EngineStats, GenerationDelta, SamplingParams, Usage
from models.errors import EngineDead, InvalidRequest
from models.prompts import Template, get_template

if TYPE_CHECKING:
    from models import Engine, Prompt
    from models.engine.engine import Images
    from models.engine.messages import FinishedRequest

PATIENCE_S = 10.0
"""How long a test waits for what must happen; never reached unless it does not."""
NEVER_S = 1000.0
PROMPT_TOKENS = 7

T = TypeVar("T")
Step = str | BaseException | GenerationDelta | Callable[[], Awaitable[object]]
"""What the fake engine does next: say a word (or a whole delta), raise, or wait for something."""


def delta(
    text: str = "", *, finish_reason: Any = None, completion_tokens: int = 0
) -> GenerationDelta:
    usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=completion_tokens)
    return GenerationDelta("r", text=text, finish_reason=finish_reason, usage=usage)


class FakeTokenizer:
    """A token for each byte, behind a beginning of the sequence."""

    vocab_size = 257
    bos_token_id = 256

    def encode(self, text: str) -> list[int]:
        return [self.bos_token_id, *text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i != self.bos_token_id).decode("utf-8", "replace")


class FakeEngine:
    """Follows a script for every request, and keeps a book of what it was asked."""

    context_length = 512
    tokenizer = FakeTokenizer()
    template: Template = get_template("vicuna_v1")

    def __init__(self, script: Sequence[Step] = ("A ", "red ", "circle."), reason: str = "stop"):
        self.script = script
        self.reason = reason
        self.dead: EngineDead | None = None
        self.closed = False
        self.running = 0
        self.counted: dict[str, Any] = {}
        self.finished: list[FinishedRequest] = []
        self.preparing: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
        self.intervals: list[float] = []
        self.asked: list[tuple[Any, list[Image.Image], SamplingParams, float | None]] = []

    async def stream(
        self,
        prompt: Prompt,
        images: Images = (),
        params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        *,
        queue_timeout_s: float | None = None,
        min_interval_s: float = 0.0,
    ) -> AsyncIterator[GenerationDelta]:
        self.intervals.append(min_interval_s)
        await self.preparing()
        pictures = images() if callable(images) else images
        self.asked.append((prompt, list(pictures), params, queue_timeout_s))
        if params.needs_nothing:
            yield delta(finish_reason="length")
            return
        self.running += 1
        try:
            said = 0
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if callable(step):
                    await step()
                    continue
                said += 1
                if isinstance(step, GenerationDelta):
                    yield step
                    if step.finish_reason is not None:
                        return
                    continue
                yield delta(step, completion_tokens=said)
            yield delta(finish_reason=self.reason, completion_tokens=said)
        finally:
            self.running -= 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids)

    def check_tokens(self, field: str, token_ids: Sequence[int]) -> None:
        if not all(0 <= i < self.tokenizer.vocab_size for i in token_ids):
            raise InvalidRequest(field, "holds ids of no token")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<s>" if token_id == self.tokenizer.bos_token_id else bytes([token_id])

    def stats(self) -> EngineStats:
        stats = EngineStats(
            num_running=self.running, num_waiting=0, max_num_seqs=4, blocks_total=10,
            blocks_free=10, blocks_cached=0, blocks_used=0, block_size=16, image_cache_bytes=0,
            num_preemptions=0, num_steps=0, prefix_query_tokens=0, prefix_hit_tokens=0,
            dead=self.dead is not None,
        )  # fmt: skip
        return replace(stats, **self.counted)

    def take_finished(self) -> list[FinishedRequest]:
        taken, self.finished = self.finished, []
        return taken

    def check_health(self) -> None:
        if self.dead is not None:
            raise self.dead

    def close(self) -> None:
        self.closed = True


def make_config(**options: Any) -> AppConfig:
    return AppConfig.model_validate({"model_path": "demo", **options})


def make_worker(
    engine: FakeEngine | None = None,
    *,
    max_num_seqs: int = 4,
    max_waiting: int = 4,
    max_ongoing: int = 100,
    **options: Any,
) -> ModelWorker:
    """Without signs of life, so that only what a test asks for comes."""
    options = {"sign_of_life_s": NEVER_S, **options}
    config = make_config(**options)
    door = Door(max_num_seqs, max_waiting, lambda: max_ongoing)
    return ModelWorker(config, "demo-4bit-AWQ", cast("Engine", engine or FakeEngine()), door)


def engine_of(worker: ModelWorker) -> FakeEngine:
    return cast("FakeEngine", worker.engine)


def parse_records(body: bytes) -> list[dict[str, Any]]:
    """The records of a whole stream; each must have ended."""
    *records, rest = body.split(b"\0")
    assert rest == b""
    return [json.loads(record) for record in records]


def outcome(call: Callable[[], T]) -> T | InvalidRequest:
    """What it returns, or the refusal that it raises; whatever else it raises fails the test."""
    try:
        return call()
    except InvalidRequest as error:
        refused = error
    assert refused.field
    assert "0x" not in str(refused)
    assert len(str(refused)) < 300
    return refused


async def gate_records(worker: ModelWorker, params: object) -> list[dict[str, Any]]:
    """All records of one request."""
    return parse_records(b"".join([part async for part in worker.generate_stream_gate(params)]))


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other tasks bring about."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(look(), PATIENCE_S)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as a client sends it: bare base64."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


RED_PICTURE = encoded(Image.new("RGB", (8, 6), (255, 0, 0)))


class Connection:
    """One HTTP request, driven as an ASGI server drives it, so that a client can leave midway."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: bytes | None = b"{}",
        *,
        headers: Mapping[str, str] | None = None,
        spec_version: str = "2.3",
        method: str = "POST",
    ) -> None:
        """
        Args:
            body: None for one that never comes to its end.
        """
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self._spec_version = spec_version
        self._left = asyncio.Event()
        first = b'{"prompt": "' if body is None else body
        self._request = [{"type": "http.request", "body": first, "more_body": body is None}]
        raw_headers = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": raw_headers, "client": ("192.0.2.1", 1), "server": ("192.0.2.2", 21002),
        }  # fmt: skip
        self.task = asyncio.create_task(self._serve(app, scope))

    async def _serve(self, app: FastAPI, scope: dict[str, Any]) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop(0)
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._left.is_set() and self._spec_version >= "2.4":
            raise OSError("the client has left")  # as the newer specification wants it
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        await asyncio.sleep(0)

    @property
    def records(self) -> list[dict[str, Any]]:
        return parse_records(self.body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The data of a whole stream of server-sent events; the last must be [DONE]."""
        *events, done, rest = self.body.decode("ascii").split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(e.removeprefix("data: ")) for e in events if not e.startswith(":")]

    def leave(self) -> None:
        """The client goes away."""
        self._left.set()

    async def end(self) -> None:
        """Waits for the server to have finished with it."""
        await asyncio.wait_for(self.task, PATIENCE_S)


async def ask(app: FastAPI, path: str, body: bytes = b"{}", **options: Any) -> Connection:
    """A request and its whole answer."""
    connection = Connection(app, path, body, **options)
    await connection.end()
    return connection
