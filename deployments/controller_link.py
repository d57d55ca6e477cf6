"""ControllerLink: the application's one voice towards a controller.

    replicas ──report(count)──> ControllerLink ──register, heartbeat──> controller
             <──application's total──

It runs beside the replicas as a deployment of its own, so that nothing a controller does can
touch a request. It registers once a replica that has loaded and answered its first question has
reported, and it stops beating when none has for a while: a worker that cannot answer must not be
handed out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from ray import serve

from deployments.controller_client import ControllerClient, ControllerUnavailable
from deployments.load_board import ApplicationLoad, LoadBoard
from deployments.pacing import Signal

logger = logging.getLogger("ray.serve")

SILENCE_S = 5.0
"""A replica reports once a second; one that has not for so long is dead or stuck."""
BEAT_INTERVAL_S = 1.0
"""Least time between two heartbeats, however often the load changes."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 15.0
GONE_TIMEOUT_S = 10.0
"""How long, when leaving, it is waited for the worker's address to fall silent."""


@dataclass(frozen=True)
class LinkSettings:
    """
    Attributes:
        model_name: as registered.
        worker_addr: where the controller's clients reach the application.
        worker_id: for the log.
        heartbeat_interval_s: between two heartbeats while the load stays the same.
        refresh_on_shutdown: have the controller poll all its workers when this one leaves.
    """

    controller_addr: str
    worker_addr: str
    worker_id: str
    model_name: str
    heartbeat_interval_s: float
    refresh_on_shutdown: bool = False


def scaled_to_zero(deployment_name: str) -> bool:
    """Whether there is no replica because none is wanted just now; requests will bring one back,
    so the worker stays registered."""
    try:
        applications = serve.status().applications
    except Exception as error:  # Serve itself is being restarted, perhaps
        logger.debug("Ray Serve's status is not to be had: %s", type(error).__name__)
        return False
    application = applications.get(serve.get_replica_context().app_name)
    deployment = application and application.deployments.get(deployment_name)
    return bool(deployment and deployment.status == "HEALTHY" and not deployment.replica_states)


class ControllerLink:
    """All methods run on one event loop."""

    def __init__(self, settings: LinkSettings, deployment_name: str) -> None:
        """
        Args:
            deployment_name: of the replicas.
        """
        self._settings = settings
        self._deployment_name = deployment_name
        self._client = ControllerClient(settings.controller_addr, settings.worker_addr)
        self._board = LoadBoard(SILENCE_S)
        self._changed = Signal()
        self._registered_speed: int | None = None
        self._reachable: bool | None = None
        self._closing = False
        self._task = asyncio.create_task(self._run())

    # ---- what replicas call -----------------------------------------------------------------

    async def report(self, replica_id: str, queue_length: int) -> ApplicationLoad:
        """A replica's count of requests running and waiting; answers the application's."""
        before = self._load()
        self._board.report(replica_id, queue_length, time.monotonic())
        after = self._load()
        if after != before:
            self._changed.set()
        return after

    async def leave(self, replica_id: str) -> None:
        """A replica shuts down."""
        self._board.leave(replica_id)
        self._changed.set()

    def check_health(self) -> None:
        """Fails when the loop has died, which would be a mistake in it."""
        if self._task.done() and not self._task.cancelled():
            raise RuntimeError("the controller link's loop has ended") from self._task.exception()

    # ---- upstream's seams -------------------------------------------------------------------

    def get_status(self) -> dict[str, Any]:
        """The application's, as registered. `speed` is the number of live replicas, since
        controllers rank workers by queue_length / speed."""
        load = self._load()
        return {
            "model_names": [self._settings.model_name],
            "speed": max(1, load.replicas),
            "queue_length": load.queue_length,
        }

    async def register_to_controller(self) -> None:
        """
        Raises:
            ControllerUnavailable: it is not registered.
        """
        status = self.get_status()
        await self._client.register(status)
        self._registered_speed = status["speed"]
        logger.info(
            "%s: registered %s as %s with %s", self._settings.worker_id, status,
            self._settings.worker_addr, self._settings.controller_addr,
        )  # fmt: skip

    async def send_heart_beat(self) -> None:
        """Registers again where the controller has forgotten the worker, or knows another speed.

        Raises:
            ControllerUnavailable: it was not received.
        """
        status = self.get_status()
        if status["speed"] != self._registered_speed or not await self._client.heartbeat(
            status["queue_length"]
        ):
            await self.register_to_controller()

    # ---- the loop ---------------------------------------------------------------------------

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._closing:  # a cancellation may be lost before Python 3.12
            pause_s = self._settings.heartbeat_interval_s
            if await self._can_answer():
                try:
                    await self.send_heart_beat()
                    self._note_reachable(True)
                    retry_s = FIRST_RETRY_S
                except ControllerUnavailable as error:
                    self._note_reachable(False, str(error))
                    pause_s, retry_s = retry_s, min(2 * retry_s, LONGEST_RETRY_S)
                    # It may come back as another process that knows nobody.
                    await asyncio.sleep(pause_s)
                    continue
            await asyncio.sleep(BEAT_INTERVAL_S)
            await self._changed.within(max(0.0, pause_s - BEAT_INTERVAL_S))
            self._changed.clear()

    async def _can_answer(self) -> bool:
        if self._load().replicas > 0:
            return True
        if self._registered_speed is None:
            return False  # still loading
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, scaled_to_zero, self._deployment_name)

    def _load(self) -> ApplicationLoad:
        return self._board.load(time.monotonic())

    def _note_reachable(self, reachable: bool, why: str = "") -> None:
        """One line when it changes, not one for every try."""
        if reachable == self._reachable:
            return
        self._reachable = reachable
        address = self._settings.controller_addr
        if reachable:
            logger.info("the controller at %s answers", address)
        else:
            logger.warning(
                "the controller at %s cannot be reached (%s); requests are served all the same, "
                "and registration is tried again", address, why,
            )  # fmt: skip

    # ---- the end ----------------------------------------------------------------------------

    async def close(self) -> None:
        """Stops beating, and has the controller forget the worker as far as its protocol allows:
        there is no call for it, so either it expires or all workers are polled again."""
        self._closing = True
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._registered_speed is None or not self._settings.refresh_on_shutdown:
            return
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while not await self._client.worker_is_gone() and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        try:
            await self._client.refresh_all_workers()
        except ControllerUnavailable as error:
            logger.warning("the controller was not told of the shutdown (%s)", error)
