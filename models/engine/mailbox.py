"""Where one request's deltas wait for the coroutine that reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from models.engine.messages import GenerationDelta
from models.engine.outbox import merged


class Mailbox:
    """Filled by the engine's thread, read on one event loop.

    Waking a loop costs more than computing a small model's token, and takes the interpreter's lock
    from the engine's thread. So the loop is woken only where the reader waits for a delta, and
    once for all deltas that have come when it looks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._deltas: deque[GenerationDelta] = deque()
        self._is_awaited = False
        self._bell = asyncio.Event()

    # ---- the engine's thread ------------------------------------------------------------------

    def put(self, delta: GenerationDelta) -> bool:
        """Whether the loop must be woken for it, by `ring`."""
        # In this order, and the reader's the other way round, so that one of both sees the other.
        self._deltas.append(delta)
        return self._is_awaited

    # ---- the event loop -----------------------------------------------------------------------

    def ring(self) -> None:
        self._bell.set()

    async def take(self) -> GenerationDelta:
        """All that has come, as one delta; waits for the first. Errors come by themselves."""
        while not self._deltas:
            self._is_awaited = True
            if not self._deltas:
                await self._bell.wait()
            self._is_awaited = False
            self._bell.clear()
        taken = [self._deltas.popleft()]
        while taken[0].error is None and self._deltas and self._deltas[0].error is None:
            taken.append(self._deltas.popleft())
        return merged(taken)


def ring_all(mailboxes: Iterable[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.ring()
