"""A replica's reports to the application's ControllerLink."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from deployments.load_board import ApplicationLoad
from deployments.pacing import Signal

logger = logging.getLogger("ray.serve")

Report = Callable[[int], Awaitable[ApplicationLoad]]

INTERVAL_S = 1.0
"""Between two reports while nothing changes."""
LEAST_INTERVAL_S = 0.1
"""Between two reports however much changes: each costs about a millisecond on both sides."""
REPORT_TIMEOUT_S = 5.0
STALE_S = 3.0


class LoadReporter:
    """Reports once a second and on change, and knows the application's total from the replies."""

    def __init__(self, report: Report, count: Callable[[], int]) -> None:
        """
        Args:
            report: tells the link, and returns what it answers.
            count: this replica's requests, running and waiting.
        """
        self._report = report
        self._count = count
        self._others = 0
        self._replicas = 1
        self._answered_at = float("-inf")
        self._changed = Signal()
        self._closing = False
        self._task = asyncio.create_task(self._run())

    def changed(self) -> None:
        """The count is another than before."""
        self._changed.set()

    def load(self) -> ApplicationLoad:
        """The application's, without asking anyone: the others' as of their last reports, and this
        replica's as it is now. Of this replica alone where the link has gone silent."""
        if time.monotonic() - self._answered_at > STALE_S:
            return ApplicationLoad(self._count(), 1)
        return ApplicationLoad(self._others + self._count(), self._replicas)

    async def close(self) -> None:
        self._closing = True
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while not self._closing:  # `wait_for` may lose a cancellation before Python 3.12
            self._changed.clear()
            count = self._count()
            try:
                reply = await asyncio.wait_for(self._report(count), REPORT_TIMEOUT_S)
            except Exception as error:  # whatever has become of the link, requests go on
                logger.debug("the controller link did not answer: %s", type(error).__name__)
            else:
                self._others = max(0, reply.queue_length - count)
                self._replicas = max(1, reply.replicas)
                self._answered_at = time.monotonic()
            await asyncio.sleep(LEAST_INTERVAL_S)
            await self._changed.within(INTERVAL_S - LEAST_INTERVAL_S)
