"""The engine's deltas, gathered into at most so many updates a second, with signs of life.

One task reads the engine as fast as it delivers, whatever the client's pace; text that comes
between two updates waits in one string. So a slow client costs memory for its own answer only.
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


class _Gathered:
    """The mailbox between the reading task and the stream."""

    def __init__(self) -> None:
        self.update = Update("", Usage(), None)
        self.fresh = asyncio.Event()  # something to send, or nothing more will come
        self.ended = asyncio.Event()  # nothing more will come

    def add(self, delta: GenerationDelta) -> None:
        self.update.text += delta.text
        self.update.usage = delta.usage
        self.update.finish_reason = delta.finish_reason
        self.update.logprobs += delta.logprobs
        self.update.stop_reason = delta.stop_reason
        self.update.prompt_logprobs += delta.prompt_logprobs
        if self.update.has_news:
            self.fresh.set()

    def take(self) -> Update:
        taken = self.update
        self.update = Update("", taken.usage, None)
        self.fresh.clear()
        return taken


async def paced(
    deltas: AsyncGenerator[GenerationDelta, None],
    *,
    min_interval_s: float,
    sign_of_life_s: float,
) -> AsyncGenerator[Update, None]:
    """Yields the first text at once, then an update at most every `min_interval_s` seconds.

    While nothing comes, an empty update every `sign_of_life_s`. The last one carries the
    finish_reason. Closing it, or cancelling whoever iterates over it, closes `deltas`.
    """
    gathered = _Gathered()
    reader = asyncio.create_task(_read(deltas, gathered))
    try:
        while not gathered.ended.is_set():
            if not await within(gathered.fresh, sign_of_life_s):
                yield Update("", gathered.update.usage, None)
            elif gathered.update.has_news:
                update = gathered.take()
                yield update
                if update.finish_reason is not None:
                    break
                await within(gathered.ended, min_interval_s)
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
        gathered.ended.set()
        gathered.fresh.set()


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event was set in time.

    Not by `asyncio.wait_for`: until Python 3.12 it loses a cancellation that comes together with
    the event, and the answer would go on for nobody.
    """
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiting], timeout=seconds)
        return event.is_set()
    finally:
        waiting.cancel()
