"""What there is to know about one request, gathered on its way through the replica.

Whoever is on that way finds the entry by `current_entry()`, as it is in the context of the task
that answers the request. Nothing has to be passed along, and a request that nobody keeps a log of
(a test's, say) costs an entry that is thrown away.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.error_types import error_type
from models import GenerationDelta, Usage
from models.errors import RequestAborted

if TYPE_CHECKING:
    from models import Prompt  # its module needs torch

T = TypeVar("T")

MAX_ID_CHARS = 128
NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._:/+=@-]")


def request_id_of(given: str | None) -> str:
    """A request id as its sender gave it, less what could do harm in a log; else a new one."""
    return NOT_IN_IDS.sub("", given or "")[:MAX_ID_CHARS] or uuid.uuid4().hex


@dataclass
class Part:
    """One prompt's, or one choice's, way through the engine.

    Attributes:
        counts_prompt: false for all but one of a prompt's choices.
        first_token: by `time.monotonic()`.
    """

    counts_prompt: bool
    keeps_text: bool
    usage: Usage = field(default_factory=Usage)
    queue_s: float | None = None
    first_token: float | None = None
    finish_reason: str = "abort"
    text: str = ""

    def add(self, delta: GenerationDelta) -> None:
        self.usage = delta.usage
        timing = delta.timing
        if timing is not None and timing.started is not None:
            self.queue_s = timing.started - timing.queued
            self.first_token = timing.first_token
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
        if self.keeps_text:
            self.text += delta.text


@dataclass
class RequestEntry:
    """
    Attributes:
        method: HTTP's, or "handle" for calls through a DeploymentHandle.
        route: the pattern that was matched, or the handle's method.
        status: HTTP's; None where there is none.
        error_type: by `deployments.error_types`.
        client_gone: it left before the answer's end.
        prompts: kept only where content is logged.
    """

    request_id: str = ""
    method: str = ""
    route: str = ""
    keeps_content: bool = False
    status: int | None = None
    error_type: str | None = None
    client_gone: bool = False
    num_images: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    is_open: bool = True
    arrived_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def add_prompt(self, prompt: Prompt, num_images: int) -> None:
        self.num_images += num_images
        if self.keeps_content:
            self.prompts.append(prompt)

    def note_error(self, error: BaseException) -> None:
        self.error_type = error_type(error)

    async def watched(
        self, deltas: AsyncGenerator[GenerationDelta, None], *, counts_prompt: bool = True
    ) -> AsyncGenerator[GenerationDelta, None]:
        """The same deltas, noted."""
        part = Part(counts_prompt, self.keeps_content)
        self.parts.append(part)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    part.add(delta)
                    yield delta
        except RequestAborted:
            raise
        except Exception:
            part.finish_reason = "error"
            raise

    def as_json(self, model: str) -> dict[str, Any]:
        """The line of the access log. Durations count from the request's first byte."""
        parts = self.parts
        prompts = [part.usage for part in parts if part.counts_prompt]
        queue = [part.queue_s for part in parts if part.queue_s is not None]
        first = [part.first_token for part in parts if part.first_token is not None]
        ended = time.monotonic() if self.ended is None else self.ended
        line: dict[str, Any] = {
            "time": self.arrived_at.isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "model": model,
            "images": self.num_images,
            "choices": len(parts),
            "prompt_tokens": sum(usage.prompt_tokens for usage in prompts),
            "cached_tokens": sum(usage.cached_tokens for usage in prompts),
            "generated_tokens": sum(part.usage.completion_tokens for part in parts),
            "queue_ms": _ms(max(queue, default=None)),
            "ttft_ms": _ms(min(first) - self.started if first else None),
            "total_ms": _ms(ended - self.started),
            "finish_reason": ",".join(dict.fromkeys(p.finish_reason for p in parts)) or None,
            "error_type": self.error_type,
            "client_gone": self.client_gone,
        }
        if self.keeps_content:
            line["prompts"] = self.prompts
            line["answers"] = [part.text for part in parts]
        return line


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


_current: ContextVar[RequestEntry | None] = ContextVar("request", default=None)


def current_entry() -> RequestEntry:
    """Of the request that this task works on; one for nobody where there is none."""
    return _current.get() or RequestEntry()


class RequestLog:
    """Opens an entry for each request, and shows it to its listeners once it has been answered."""

    def __init__(self, *, keeps_content: bool = False) -> None:
        self.listeners: list[Callable[[RequestEntry], None]] = []
        self._keeps_content = keeps_content

    def open(self, request_id: str, method: str, route: str = "") -> RequestEntry:
        """From now on the current entry of this task, and of those that it starts."""
        entry = RequestEntry(request_id, method, route, self._keeps_content)
        _current.set(entry)
        return entry

    def close(self, entry: RequestEntry) -> None:
        entry.is_open = False
        entry.ended = time.monotonic()
        for listen in self.listeners:
            listen(entry)

    def streamed(
        self, route: str, request_id: Callable[[], str], answer: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """A method's answer, logged unless it is part of a request that is logged already."""
        return self._until_closed(self._open_call(route, request_id), answer)

    async def called(
        self, route: str, request_id: Callable[[], str], answer: Awaitable[Any]
    ) -> Any:
        """As `streamed`, for a method that returns a value, or an iterator over one."""
        entry = self._open_call(route, request_id)
        if entry is None:
            return await answer
        try:
            value = await answer
        except BaseException as error:
            self._close_failed(entry, error)
            raise
        if isinstance(value, AsyncGenerator):
            return self._until_closed(entry, value)
        self.close(entry)
        return value

    def _open_call(self, route: str, request_id: Callable[[], str]) -> RequestEntry | None:
        entry = _current.get()
        if entry is not None and entry.is_open:
            return None
        return self.open(request_id_of(request_id()), "handle", route)

    async def _until_closed(
        self, entry: RequestEntry | None, answer: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        try:
            async with aclosing(answer):
                async for item in answer:
                    yield item
        except BaseException as error:
            if entry is not None:
                self._close_failed(entry, error)
            raise
        if entry is not None:
            self.close(entry)

    def _close_failed(self, entry: RequestEntry, error: BaseException) -> None:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            entry.client_gone = True
        else:
            entry.note_error(error)
        self.close(entry)
