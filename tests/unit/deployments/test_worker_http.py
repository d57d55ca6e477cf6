"""The worker protocol over HTTP: records, statuses, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from deployments.http_app import build_http_app
from deployments.model_worker import ModelWorker
from models.errors import EngineDead, EngineFault
from tests.unit.deployments.harness import (
    NEVER_S,
    PATIENCE_S,
    RED_PICTURE,
    Connection,
    FakeEngine,
    ask,
    engine_of,
    make_worker,
    parse_records,
    until,
)

STREAM = "/worker_generate_stream"
STATUS = "/worker_get_status"
HI = b'{"prompt": "hi "}'


async def forever() -> None:
    await asyncio.sleep(NEVER_S)


async def test_an_answer_is_null_terminated_records_and_no_content_type() -> None:
    answer = await ask(build_http_app(make_worker()), STREAM, HI)
    assert answer.status == 200
    assert "content-type" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.complete
    assert answer.body.endswith(b"\0")
    assert answer.records[0]["text"] == "hi "
    assert answer.records[-1]["text"] == "hi A red circle."
    assert answer.records[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json", "text/plain", "application/x-www-form-urlencoded", "nonsense"],
)
async def test_json_is_read_whatever_it_is_called(content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = json.dumps({"prompt": "<image>", "images": [RED_PICTURE]}).encode()
    answer = await ask(build_http_app(make_worker()), STREAM, body, headers=headers)
    assert answer.records[-1]["text"] == "<image>A red circle."


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"), (b"{", "body"), (b"\xff\xfe", "body"), (b"[" * 50_000, "body"),
        (b"[]", "body"), (b"null", "body"), (b'"hi"', "body"), (b"{}", "prompt"),
        (b'{"prompt": "hi", "temperature": NaN}', "temperature"),
        (b'{"prompt": "hi", "top_k": "5"}', "top_k"),
        (b'{"prompt": "\\ud83d"}', "prompt"),
        (b'{"prompt": "<image>", "images": ["http://127.0.0.1/"]}', "images[0]"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_said_in_a_record_with_status_200(body: bytes, field: str) -> None:
    worker = make_worker()
    answer = await ask(build_http_app(worker), STREAM, body)
    assert answer.status == 200
    assert answer.records[-1]["error_code"] == 1
    assert answer.records[-1]["error_field"] == field
    assert engine_of(worker).asked == []
    assert worker.get_queue_length() == 0


async def test_an_engine_that_fails_midway_ends_the_stream_with_a_record() -> None:
    worker = make_worker(FakeEngine(["A ", EngineFault("out of memory")]))
    answer = await ask(build_http_app(worker), STREAM, HI)
    assert (answer.status, answer.complete) == (200, True)
    assert answer.records[-2]["text"] == "hi A "
    assert answer.records[-1]["error_type"] == "engine"


async def test_a_hundred_megabytes_are_refused_unread() -> None:
    answer = await ask(
        build_http_app(make_worker()), STREAM, b"{", headers={"Content-Length": str(100 << 20)}
    )
    assert answer.status == 200
    assert "larger than" in answer.records[-1]["text"]


async def test_an_upload_without_end_is_refused_once_it_is_too_large() -> None:
    """Where no size was announced: a chunked upload."""
    transport = httpx.ASGITransport(build_http_app(make_worker(max_body_bytes=1 << 20)))

    async def megabytes() -> AsyncIterator[bytes]:
        while True:
            yield b" " * (1 << 20)
            await asyncio.sleep(0)

    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        response = await asyncio.wait_for(client.post(STREAM, content=megabytes()), PATIENCE_S)
    assert response.status_code == 200
    assert "larger than" in parse_records(response.content)[-1]["text"]


async def test_an_upload_that_stalls_is_given_up() -> None:
    worker = make_worker(body_timeout_s=0.05)
    connection = Connection(build_http_app(worker), STREAM, None)
    await connection.end()
    assert "had not arrived" in connection.records[-1]["text"]


async def test_an_upload_is_let_in_only_while_there_is_room_for_control_calls() -> None:
    worker = make_worker(max_num_seqs=1, max_waiting=0, max_ongoing=3)
    app = build_http_app(worker)
    uploading = [Connection(app, STREAM, None) for _ in range(2)]
    await asyncio.sleep(0.01)
    answer = await ask(app, STREAM, HI)
    assert answer.records[-1]["error_type"] == "overloaded"
    assert (await ask(app, STATUS)).status == 200
    for connection in uploading:
        connection.leave()
        await connection.end()
    assert (await ask(app, STREAM, HI)).records[-1]["finish_reason"] == "stop"


class TestLeaving:
    @pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
    @pytest.mark.parametrize("script", [[forever], ["A ", forever], ["A ", "red ", forever]])
    async def test_a_client_that_leaves_frees_its_place(
        self, spec_version: str, script: list[Any]
    ) -> None:
        """Servers of the older specification say so; with the newer, sending fails."""
        engine = FakeEngine(script)
        worker = make_worker(engine, sign_of_life_s=0.01)
        connection = Connection(build_http_app(worker), STREAM, HI, spec_version=spec_version)
        said = "hi " + "".join(step for step in script if isinstance(step, str))
        await until(lambda: engine.running == 1 and said.encode() in connection.body)
        assert worker.get_queue_length() == 1
        connection.leave()
        await connection.end()
        assert worker.get_queue_length() == 0
        await until(lambda: engine.running == 0)

    @pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
    async def test_a_task_that_is_cancelled_frees_its_place(self, spec_version: str) -> None:
        """As Ray Serve does with the requests of clients that have left."""
        engine = FakeEngine(["A ", forever])
        worker = make_worker(engine)
        connection = Connection(build_http_app(worker), STREAM, HI, spec_version=spec_version)
        await until(lambda: b"hi A " in connection.body)
        connection.task.cancel()
        await asyncio.wait([connection.task], timeout=PATIENCE_S)
        assert worker.get_queue_length() == 0
        await until(lambda: engine.running == 0)

    async def test_a_client_that_leaves_during_its_upload_is_no_alarm(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = make_worker(max_num_seqs=1, max_waiting=0, max_ongoing=3)
        app = build_http_app(worker)
        with caplog.at_level(logging.INFO):
            for _ in range(5):  # more than there is room for, were their places kept
                connection = Connection(app, STREAM, None)
                await asyncio.sleep(0.005)
                connection.leave()
                await connection.end()
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
        assert engine_of(worker).asked == []
        assert (await ask(app, STREAM, HI)).records[-1]["finish_reason"] == "stop"

    async def test_a_client_of_a_real_server_that_hangs_up_frees_its_place(self) -> None:
        engine = FakeEngine(["A ", forever])
        worker = make_worker(engine, sign_of_life_s=0.01)
        async with (
            served(worker) as address,
            httpx.AsyncClient(base_url=address, timeout=NEVER_S) as client,
        ):
            async with client.stream("POST", STREAM, content=HI) as response:
                assert response.status_code == 200
                async for part in response.aiter_raw():
                    if b"hi A " in part:
                        break
                assert worker.get_queue_length() == 1
            await until(lambda: worker.get_queue_length() == 0 and engine.running == 0)
            engine.script = ["fine"]
            response = await client.post(STREAM, content=HI)
            assert parse_records(response.content)[-1]["text"] == "hi fine"
        assert engine.closed


@contextlib.asynccontextmanager
async def served(worker: ModelWorker) -> AsyncIterator[str]:
    """The application behind a real HTTP server, on a port of its own."""
    config = uvicorn.Config(build_http_app(worker), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


class TestControl:
    @pytest.mark.parametrize("body", [b"", b"{}", b"nonsense", b"[" * 1000])
    async def test_the_status_is_told_whatever_is_asked(self, body: bytes) -> None:
        answer = await ask(build_http_app(make_worker()), STATUS, body)
        assert answer.status == 200
        assert json.loads(answer.body) == {
            "model_names": ["demo-4bit-AWQ"], "speed": 1, "queue_length": 0,
        }  # fmt: skip

    async def test_the_status_is_told_while_the_model_is_busy(self) -> None:
        worker = make_worker(FakeEngine([forever]), max_num_seqs=1, max_waiting=1)
        app = build_http_app(worker)
        holders = [Connection(app, STREAM, HI) for _ in range(3)]
        await until(lambda: worker.get_queue_length() == 2)
        answer = await ask(app, STATUS)
        assert json.loads(answer.body)["queue_length"] == 2
        await holders[2].end()
        assert holders[2].records[-1]["error_type"] == "overloaded"
        for holder in holders[:2]:
            holder.leave()
            await holder.end()
        assert json.loads((await ask(app, STATUS)).body)["queue_length"] == 0

    async def test_health_follows_the_engine(self) -> None:
        worker = make_worker()
        app = build_http_app(worker)
        alive = await ask(app, "/health", method="GET")
        assert (alive.status, json.loads(alive.body)) == (200, {"status": "ok"})
        engine_of(worker).dead = EngineDead("the engine has died of RuntimeError")
        dead = await ask(app, "/health", method="GET")
        assert dead.status == 503
        assert json.loads(dead.body)["status"] == "dead"

    async def test_the_front_page_and_the_description_name_the_routes(self) -> None:
        app = build_http_app(make_worker())
        front = json.loads((await ask(app, "/", method="GET")).body)
        assert front["model"] == "demo-4bit-AWQ"
        described = json.loads((await ask(app, "/openapi.json", method="GET")).body)["paths"]
        listed = {route.split()[1] for route in front["routes"]} - {"/openapi.json"}
        assert {STREAM, STATUS, "/health"} <= listed <= set(described)

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", STREAM, 405), ("GET", STATUS, 405), ("POST", "/health", 405),
         ("GET", "/docs", 404), ("GET", "/redoc", 404), ("POST", "/worker_get_embeddings", 404)],
    )  # fmt: skip
    async def test_other_routes_do_not_exist(self, method: str, path: str, status: int) -> None:
        answer = await ask(build_http_app(make_worker()), path, method=method)
        assert answer.status == status

    async def test_the_worker_ends_with_the_application(self) -> None:
        worker = make_worker()
        app = build_http_app(worker)
        async with app.router.lifespan_context(app):
            assert not engine_of(worker).closed
        assert engine_of(worker).closed
