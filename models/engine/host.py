"""Where an engine's steps run: in a thread of this process, or in a process of their own.

callers (any thread, any event loop)             host
------------------------------------             ----
Engine._submit ──GenerationRequest──┐
Engine.abort ──────────Abort────────┴─> post ──> EngineLoop: core.add, core.abort, core.step
Engine._deliver <──────GenerationDelta───────────  Outbox: deliver, in a thread of the host
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from models.engine.loop import Deliver, EngineLoop
from models.engine.messages import Abort, EngineStats, GenerationRequest
from models.errors import EngineDead

Stopped: TypeAlias = Callable[[EngineDead], None]


class EngineHost(ABC):
    @abstractmethod
    def start(self, deliver: Deliver, stopped: Stopped) -> None:
        """
        Args:
            deliver: takes the deltas that are due after a step, in a thread of the host.
            stopped: called there once, last of all, with the reason.
        """

    @abstractmethod
    def post(self, message: GenerationRequest | Abort) -> None:
        """From any thread, in order; never blocks."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot: each figure right, together perhaps a step apart."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether there is still something that could answer."""

    @abstractmethod
    def close(self) -> None:
        """Ends what runs and waits, and returns once all is over."""


class ThreadHost(EngineHost):
    """In this process, whose interpreter lock it shares with the callers."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver, stopped: Stopped) -> None:
        def run() -> None:
            stopped(self.loop.run(deliver))

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def post(self, message: GenerationRequest | Abort) -> None:
        self.loop.post(message)

    def stats(self) -> EngineStats:
        return self.loop.core.stats()

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        self.loop.close()
        if self._thread is not None:
            self._thread.join()
