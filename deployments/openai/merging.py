"""Several answers' updates as one sequence, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.pacing import Update


async def merged(
    streams: Sequence[AsyncGenerator[Update, None]],
) -> AsyncGenerator[tuple[int, Update], None]:
    """Yields (which stream, its update). What ends one of them with an error ends them all.

    Closing it, or cancelling whoever iterates over it, closes all streams.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as updates:
            async for update in updates:
                yield 0, update
        return
    # One at a time: a slow client's text gathers inside the streams, where it is one string.
    queue: asyncio.Queue[tuple[int, Update] | Exception | None] = asyncio.Queue(maxsize=1)
    readers = [asyncio.create_task(_read(i, stream, queue)) for i, stream in enumerate(streams)]
    left = len(readers)
    try:
        while left > 0:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    index: int,
    stream: AsyncGenerator[Update, None],
    queue: asyncio.Queue[tuple[int, Update] | Exception | None],
) -> None:
    try:
        async with aclosing(stream):
            async for update in stream:
                await queue.put((index, update))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
