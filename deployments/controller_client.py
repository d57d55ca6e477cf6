"""The controller's side of the worker protocol, as LLaVA, TinyChat and FastChat speak it.

Whatever a controller does (silence, slowness, redirects, garbage), a call ends in time, either
well or with `ControllerUnavailable`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

TIMEOUT_S = 5.0
"""For a whole call, as upstream's workers."""
MAX_REPLY_BYTES = 64 << 10
HTTP_OK = 200


class ControllerUnavailable(Exception):
    """The controller did not answer, or not as the protocol says."""


class ControllerClient:
    """Speaks for one worker address."""

    def __init__(self, controller_addr: str, worker_addr: str) -> None:
        self._controller_addr = controller_addr
        self._worker_addr = worker_addr

    async def register(self, status: dict[str, Any]) -> None:
        """
        Args:
            status: what `/worker_get_status` answers.

        Raises:
            ControllerUnavailable: it is not registered.
        """
        await self._post(
            "register_worker",
            {
                "worker_name": self._worker_addr,
                "check_heart_beat": True,
                "worker_status": status,
                "multimodal": True,  # FastChat's; the others ignore it
            },
        )

    async def heartbeat(self, queue_length: int) -> bool:
        """Whether the controller still knows the worker.

        Raises:
            ControllerUnavailable: nobody knows.
        """
        reply = await self._post(
            "receive_heart_beat",
            {"worker_name": self._worker_addr, "queue_length": queue_length},
        )
        exist = reply.get("exist") if isinstance(reply, dict) else None
        if not isinstance(exist, bool):
            raise ControllerUnavailable("it answered a heartbeat without `exist`")
        return exist

    async def refresh_all_workers(self) -> None:
        """Makes the controller ask all its workers for their status, and drop those that are gone.

        Raises:
            ControllerUnavailable: perhaps it did not.
        """
        await self._post("refresh_all_workers", {})

    async def worker_is_gone(self) -> bool:
        """Whether the worker's own address has stopped answering status calls."""
        try:
            await self._post_to(f"{self._worker_addr}/worker_get_status", {})
        except ControllerUnavailable:
            return True
        return False

    async def _post(self, route: str, body: dict[str, Any]) -> Any:
        return await self._post_to(f"{self._controller_addr}/{route}", body)

    async def _post_to(self, url: str, body: dict[str, Any]) -> Any:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            # A session for each call: at one call in 15 s, a kept connection would only go stale.
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, json=body, allow_redirects=False) as response,
            ):
                if response.status != HTTP_OK:
                    raise ControllerUnavailable(f"it answered {response.status}")
                reply = await response.content.read(MAX_REPLY_BYTES)
                return json.loads(reply or b"null")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ControllerUnavailable(f"{type(error).__name__}") from error
        except ValueError as error:
            raise ControllerUnavailable("it answered something that is not JSON") from error
