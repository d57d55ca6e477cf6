"""Steps until it is closed: requests and aborts in, deltas out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import torch

from models.engine.core import EngineCore
from models.engine.messages import Abort, GenerationDelta, GenerationRequest
from models.engine.outbox import Outbox
from models.errors import EngineDead

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps that fail in a row before the engine gives up: by then the device itself is broken."""

Deliver: TypeAlias = Callable[[list[GenerationDelta]], None]


class EngineLoop:
    """Everything that touches the core happens in the one thread that calls `run`."""

    def __init__(self, core: EngineCore, num_threads: int) -> None:
        """
        Args:
            num_threads: of the CPU, for each step.
        """
        self.core = core
        self._num_threads = num_threads
        self._inbox: deque[GenerationRequest | Abort] = deque()
        self._outbox = Outbox()
        self._wake = threading.Event()
        self._closing = False

    def post(self, message: GenerationRequest | Abort) -> None:
        """From any thread. An abort of what has ended, or is unknown, does no harm."""
        self._inbox.append(message)
        self._wake.set()

    def close(self) -> None:
        """From any thread: ends what runs and waits, after the step under way."""
        self._closing = True
        self._wake.set()

    def run(self, deliver: Deliver) -> EngineDead:
        """Returns why it has ended; all blocks have come back by then.

        Args:
            deliver: called after each step and each look into the inbox that changed something,
                even if there is nothing to deliver.
        """

        def post(deltas: list[GenerationDelta]) -> None:
            deliver(self._outbox.post(deltas, time.monotonic()))

        torch.set_num_threads(self._num_threads)
        stopped = EngineDead("the engine has been closed")
        try:
            self._run(post)
        except BaseException as error:
            logger.exception("the engine's thread has died")
            stopped = EngineDead(f"the engine has died of {type(error).__name__}")
        scheduler = self.core.scheduler
        for seq in (*scheduler.running, *scheduler.waiting):
            scheduler.finish(seq, "error", error=stopped)
        deliver(self._outbox.flush())
        return stopped

    def _run(self, deliver: Deliver) -> None:
        failed_steps = 0
        while not self._closing:
            if self._inbox:
                deliver(self._read_inbox())
            if not self.core.has_work:
                self.core.check_idle()
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                deltas = self.core.step()
            except Exception as error:
                failed_steps += 1
                logger.exception("an engine step failed (%d in a row)", failed_steps)
                deliver(self.core.fail_running(error))
                if failed_steps >= MAX_FAILED_STEPS:
                    raise
            else:
                failed_steps = 0
                deliver(deltas)

    def _read_inbox(self) -> list[GenerationDelta]:
        deltas: list[GenerationDelta] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Abort):
                deltas += self.core.abort(message.request_id)
            else:
                self._outbox.open(message.request_id, message.min_interval_s)
                self.core.add(message, self._wake.set)
        return deltas
