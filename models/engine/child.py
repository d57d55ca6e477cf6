"""The engine's process: `python -m models.engine.child DESCRIPTOR`, started by `ProcessHost`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from models.engine.core import EngineCore
from models.engine.loop import EngineLoop
from models.engine.messages import GenerationDelta
from models.engine.wire import Close, Ended, Ready, Step, receive, send
from models.loading import load_core

STATS_INTERVAL_S = 0.1
"""How old the parent's figures may become while the engine works and nothing is delivered."""


def main(descriptor: int) -> None:
    # Ctrl-C in a terminal reaches all processes there; the parent decides what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        loaded = load_core(**receive(connection))
    except Exception as error:
        send(connection, error)
        return
    core = loaded.core
    send(connection, Ready(loaded.model, core.stats()))
    loop = EngineLoop(core, loaded.num_threads)
    threading.Thread(target=_read_into, args=(connection, loop), daemon=True).start()
    reason = loop.run(Reports(connection, core).send)
    send(connection, Ended(reason, core.stats()))


class Reports:
    """To the parent: deltas, and the engine's figures with them, or without where they must be."""

    def __init__(self, connection: Connection[Any, Any], core: EngineCore) -> None:
        self._connection = connection
        self._core = core
        self._told_load = (0, 0)
        self._told_at = 0.0

    def send(self, deltas: list[GenerationDelta]) -> None:
        scheduler, now = self._core.scheduler, time.monotonic()
        load = (len(scheduler.running), len(scheduler.waiting))
        if deltas or load != self._told_load or now - self._told_at >= STATS_INTERVAL_S:
            send(self._connection, Step(deltas, self._core.stats()))
            self._told_load, self._told_at = load, now


def _read_into(connection: Connection[Any, Any], loop: EngineLoop) -> None:
    try:
        while True:
            message = receive(connection)
            if isinstance(message, Close):
                loop.close()
                return
            loop.post(message)
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone, and with it everyone who could want an answer


if __name__ == "__main__":
    main(int(sys.argv[1]))
