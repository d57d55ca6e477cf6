"""The engine's deltas at the client's pace, with signs of life.

One task reads the engine as fast as it delivers; what comes while the client is still busy with the
update before waits in one string. So a slow client costs memory for its own answer only. That it
gets no more updates than it wants is the engine's work: see `min_interval_s` of `Engine.stream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from models import GenerationDelta, PromptToken, TokenLogprobs, Usage


@dataclass
class Update:
    """What is new since the last one; `text` is "" in a mere sign of life.

    Attributes:
        logprobs: of the tokens since the last one, where they were asked for.
        stop_reason, prompt_logprobs: as in GenerationDelta.
    """

    text: str
    usage: Usage
    finish_reason: str | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[PromptToken, ...] = ()

    @property
    def has_news(self) -> bool:
        return self.text != "" or self.finish_reason is not None


class Signal:
    """An event for one waiter, whose wait costs no task.

    Not `asyncio.wait_for` and an `asyncio.Event`: until Python 3.12 that loses a cancellation that
    comes together with the event, and the answer would go on for nobody.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        self._wake()

    def clear(self) -> None:
        self._is_set = False

    async def within(self, seconds: float) -> bool:
        """Whether it was set in time."""
        if not self._is_set:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return self._is_set

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Gathered:
    """The mailbox between the reading task and the stream."""

    def __init__(self) -> None:
        self.update = Update("", Usage(), None)
        self.fresh = Signal()  # something to send, or nothing more will come
        self.has_ended = False  # nothing more will come

    def add(self, delta: GenerationDelta) -> None:
        self.update.text += delta.text
        self.update.usage = delta.usage
        self.update.finish_reason = delta.finish_reason
        self.update.logprobs += delta.logprobs
        self.update.stop_reason = delta.stop_reason
        self.update.prompt_logprobs += delta.prompt_logprobs
        if self.update.has_news:
            self.fresh.set()

    def end(self) -> None:
        self.has_ended = True
        self.fresh.set()

    def take(self) -> Update:
        taken = self.update
        self.update = Update("", taken.usage, None)
        self.fresh.clear()
        return taken


async def paced(
    deltas: AsyncGenerator[GenerationDelta, None], *, sign_of_life_s: float
) -> AsyncGenerator[Update, None]:
    """Yields what has come, as often as somebody asks for it and something has.

    While nothing comes, an empty update every `sign_of_life_s`. The last one carries the
    finish_reason. Closing it, or cancelling whoever iterates over it, closes `deltas`.
    """
    gathered = _Gathered()
    reader = asyncio.create_task(_read(deltas, gathered))
    try:
        while not gathered.has_ended:
            if not await gathered.fresh.within(sign_of_life_s):
                yield Update("", gathered.update.usage, None)
            elif gathered.update.has_news:
                update = gathered.take()
                yield update
                if update.finish_reason is not None:
                    break
        if gathered.update.has_news:
            yield gathered.take()
        await reader  # raises what ended it
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(deltas: AsyncGenerator[GenerationDelta, None], gathered: _Gathered) -> None:
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                gathered.add(delta)
    finally:
        gathered.end()
