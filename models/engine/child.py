"""The engine's process: `python -m models.engine.child DESCRIPTOR`, started by `ProcessHost`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from models.engine.loop import EngineLoop
from models.engine.wire import Close, Ended, Ready, Step, receive, send
from models.loading import load_core


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
    reason = loop.run(lambda deltas: send(connection, Step(deltas, core.stats())))
    send(connection, Ended(reason, core.stats()))


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
