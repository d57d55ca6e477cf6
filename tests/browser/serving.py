"""The application on a port of this machine, in a thread: what a browser needs of a server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from deployments.door import Door
from deployments.http_app import build_http_app
from deployments.model_worker import ModelWorker
from tests.unit.deployments.harness import PATIENCE_S, make_config

if TYPE_CHECKING:
    from models import Engine


def port_of_its_own() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(worker: ModelWorker, port: int | None = None) -> Iterator[str]:
    """Serves `worker` until the block ends; gives the address. Open streams end with it."""
    port = port or port_of_its_own()
    config = uvicorn.Config(
        build_http_app(worker), "127.0.0.1", port, log_config=None, lifespan="off",
        timeout_graceful_shutdown=0,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


def worker_of(engine: Engine) -> ModelWorker:
    """A worker around a real engine."""
    return ModelWorker(make_config(), "llava-demo-4bit-AWQ", engine, Door(4, 4, lambda: 100))


class Gate:
    """What a fake engine waits for, opened by the test in another thread."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self) -> None:
        while not self._open.is_set():
            await asyncio.sleep(0.005)


def pause(seconds: float) -> Callable[[], Awaitable[object]]:
    """A step of a fake engine."""
    return lambda: asyncio.sleep(seconds)
