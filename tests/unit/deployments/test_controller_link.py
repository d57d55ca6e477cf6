"""The link against controllers that behave, and against those that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from deployments import controller_client, controller_link
from deployments.controller_client import ControllerClient, ControllerUnavailable
from deployments.controller_link import ControllerLink, LinkSettings

WORKER = "http://localhost:21002"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_link, "BEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(controller_link, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(controller_link, "LONGEST_RETRY_S", 0.1)
    monkeypatch.setattr(controller_link, "GONE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(controller_link, "scaled_to_zero", lambda name: False)
    monkeypatch.setattr(controller_client, "TIMEOUT_S", 0.5)


class Controller:
    """What LLaVA's controller does, and what it was told."""

    def __init__(self) -> None:
        self.workers: dict[str, dict[str, Any]] = {}
        self.beats: list[dict[str, Any]] = []
        self.registrations: list[dict[str, Any]] = []
        self.refreshes = 0

    async def register_worker(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.registrations.append(body)
        self.workers[body["worker_name"]] = body
        return web.json_response(None)

    async def receive_heart_beat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.beats.append(body)
        return web.json_response({"exist": body["worker_name"] in self.workers})

    async def refresh_all_workers(self, request: web.Request) -> web.StreamResponse:
        self.refreshes += 1
        return web.json_response(None)

    def routes(self) -> dict[str, Handler]:
        return {
            "register_worker": self.register_worker,
            "receive_heart_beat": self.receive_heart_beat,
            "refresh_all_workers": self.refresh_all_workers,
        }


@asynccontextmanager
async def serving(routes: dict[str, Handler]) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes([web.post(f"/{name}", handler) for name, handler in routes.items()])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def linked(address: str, **more: Any) -> AsyncIterator[ControllerLink]:
    settings = LinkSettings(
        controller_addr=address, worker_addr=WORKER, worker_id="w", model_name="llava-4bit-AWQ",
        heartbeat_interval_s=0.1, **more,
    )  # fmt: skip
    link = ControllerLink(settings, "ModelWorker")
    try:
        yield link
    finally:
        await link.close()


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 10)


async def test_nothing_is_registered_before_a_replica_can_answer() -> None:
    controller = Controller()
    async with serving(controller.routes()) as address, linked(address) as link:
        await asyncio.sleep(0.2)
        assert controller.registrations == []
        await link.report("a", 0)
        await until(lambda: bool(controller.registrations))
        assert controller.registrations[0] == {
            "worker_name": WORKER,
            "check_heart_beat": True,
            "worker_status": {
                "model_names": ["llava-4bit-AWQ"], "speed": 1, "queue_length": 0,
            },
            "multimodal": True,
        }  # fmt: skip


async def test_the_load_of_all_replicas_is_beaten_when_it_changes() -> None:
    controller = Controller()
    async with serving(controller.routes()) as address, linked(address) as link:
        await link.report("a", 2)
        reply = await link.report("b", 3)
        assert (reply.queue_length, reply.replicas) == (5, 2)
        await until(lambda: any(beat["queue_length"] == 5 for beat in controller.beats))
        await until(lambda: controller.workers[WORKER]["worker_status"]["speed"] == 2)


async def test_a_controller_that_forgot_the_worker_is_told_again() -> None:
    controller = Controller()
    async with serving(controller.routes()) as address, linked(address) as link:
        await link.report("a", 0)
        await until(lambda: WORKER in controller.workers)
        controller.workers.clear()
        await until(lambda: WORKER in controller.workers)


async def test_a_worker_without_replicas_stops_beating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_link, "SILENCE_S", 0.2)
    controller = Controller()
    async with serving(controller.routes()) as address, linked(address) as link:
        link._board._silence_s = 0.2
        await link.report("a", 0)
        await until(lambda: bool(controller.beats))
        await asyncio.sleep(0.5)
        heard = len(controller.beats)
        await asyncio.sleep(0.4)
        assert len(controller.beats) == heard


async def test_a_worker_that_is_scaled_to_zero_on_purpose_goes_on_beating(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_link, "scaled_to_zero", lambda name: name == "ModelWorker")
    controller = Controller()
    async with serving(controller.routes()) as address, linked(address) as link:
        await link.report("a", 0)
        await until(lambda: bool(controller.registrations))
        await link.leave("a")
        heard = len(controller.beats)
        await until(lambda: len(controller.beats) > heard + 2)


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.json_response(None)


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(600):
        await response.write(b" ")
        await asyncio.sleep(0.1)
    return response


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(2000):
        await response.write(b" " * (1 << 20))
    return response


def answering(status: int = 200, text: str = "null", **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text, headers=headers)

    return handler


MISBEHAVING: dict[str, Handler] = {
    "silent": silent,
    "dripping": dripping,
    "endless": endless,
    "failing": answering(500, "oops"),
    "redirecting": answering(307, "", Location=f"{WORKER}/elsewhere"),
    "garbage": answering(200, "<html>"),
    "wrong": answering(200, json.dumps({"exist": "yes"})),
    "list": answering(200, "[1]"),
}


@pytest.mark.parametrize("name", MISBEHAVING)
async def test_whatever_a_controller_does_the_call_ends(name: str) -> None:
    handler = MISBEHAVING[name]
    async with serving({"receive_heart_beat": handler}) as address:
        with pytest.raises(ControllerUnavailable):
            await asyncio.wait_for(ControllerClient(address, WORKER).heartbeat(0), 5)


@pytest.mark.parametrize("name", MISBEHAVING)
async def test_and_the_link_lives_and_tries_again(name: str) -> None:
    controller = Controller()
    calls = 0

    async def register(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls <= 2:
            return await MISBEHAVING[name](request)
        return await controller.register_worker(request)

    routes = {**controller.routes(), "register_worker": register}
    async with serving(routes) as address, linked(address) as link:
        await link.report("a", 0)

        def is_heard() -> bool:
            link.check_health()
            # A registration's answer is not looked at, as long as it is JSON.
            return WORKER in controller.workers or (name in {"wrong", "list"} and calls > 0)

        await until(is_heard)
        assert (await link.report("a", 3)).queue_length == 3


async def test_a_controller_that_is_away_is_found_when_it_comes() -> None:
    async with serving({}) as address:
        pass  # the port is free again
    async with linked(address) as link:
        await link.report("a", 1)
        await asyncio.sleep(0.2)
        link.check_health()


async def test_on_shutdown_the_controller_is_made_to_look_once_the_worker_is_gone() -> None:
    controller = Controller()
    async with serving(controller.routes()) as address:
        async with linked(address, refresh_on_shutdown=True) as link:
            await link.report("a", 0)
            await until(lambda: bool(controller.registrations))
        assert controller.refreshes == 1
        async with linked(address) as link:
            await link.report("a", 0)
            await until(lambda: len(controller.registrations) == 2)
        assert controller.refreshes == 1
