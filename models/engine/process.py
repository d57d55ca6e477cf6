"""An engine's loop in a process of its own, whose interpreter lock it shares with nobody.

Serving HTTP from the same process costs small models a sixth of their tokens: each of a step's
many short operations gives the lock up, and takes it back from whoever has it.

this process                            child (`python -m models.engine.child DESCRIPTOR`)
------------                            -----
ProcessHost(arguments) ── arguments ──> load_core(**arguments)
              ready <──── Ready ─────── or the exception that it raised
post ─> writer ──── GenerationRequest, Abort, Close ──> reader ─> EngineLoop.post
deliver <─ reader <── Step (deltas, stats) ──────────── EngineLoop.run, Reports
stopped <─ reader <── Ended (reason, stats) ─────────── its end

Either side ends when the other one does, which it learns from its closed socket.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from models.engine.host import EngineHost, Stopped
from models.engine.loop import Deliver
from models.engine.messages import Abort, EngineStats, GenerationRequest
from models.engine.wire import Close, Ended, Ready, ToChild, receive, send
from models.errors import EngineDead

CLOSE_TIMEOUT_S = 30.0
"""For the step under way; then the child is killed."""


class ProcessHost(EngineHost):
    """
    Attributes:
        model: that the child has loaded.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Returns when the model has been loaded.

        Args:
            arguments: of `models.loading.load_core`.

        Raises:
            TinyChatError: whatever `load_core` raised.
            EngineDead: the child ended without a word.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "models.engine.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path)},
            )
        self._connection = Connection(ours.detach())
        try:
            send(self._connection, dict(arguments))
            answer = receive(self._connection)
        except (EOFError, OSError):
            status = self._process.wait()
            raise EngineDead(
                f"the engine's process ended while it was loading ({_ending(status)})"
            ) from None
        except BaseException:
            self._process.kill()
            raise
        if isinstance(answer, Exception):
            self._process.wait()
            raise answer
        assert isinstance(answer, Ready)
        self.model = answer.model
        self._stats = answer.stats
        self._outbox: queue.SimpleQueue[ToChild] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, deliver: Deliver, stopped: Stopped) -> None:
        def read() -> None:
            stopped(self._read(deliver))
            self._outbox.put(Close())  # lets the writer end, too

        for name, target in (("engine-reader", read), ("engine-writer", self._write)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def post(self, message: GenerationRequest | Abort) -> None:
        self._outbox.put(message)

    def stats(self) -> EngineStats:
        return self._stats

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._outbox.put(Close())
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()

    def _read(self, deliver: Deliver) -> EngineDead:
        try:
            while True:
                message = receive(self._connection)
                self._stats = message.stats
                if isinstance(message, Ended):
                    return message.reason
                if message.deltas:
                    deliver(message.deltas)
        except (EOFError, OSError):
            return EngineDead(f"the engine's process has died ({_ending(self._process.wait())})")

    def _write(self) -> None:
        try:
            while True:
                message = self._outbox.get()
                send(self._connection, message)
                if isinstance(message, Close):
                    return
        except OSError:
            return  # it is gone, which the reader finds out and says


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
