"""The access log, over HTTP as an ASGI server drives it, and through handles."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import pytest

from deployments.access_log import AccessLog, open_access_log
from deployments.http_app import build_http_app
from deployments.logged_app import LoggedApp
from deployments.model_worker import ModelWorker
from deployments.request_log import RequestEntry, RequestLog, request_id_of
from models import GenerationDelta, Usage
from models.engine.messages import Timing
from models.errors import EngineFault, InvalidRequest
from tests.unit.deployments.harness import (
    NEVER_S,
    RED_PICTURE,
    Connection,
    FakeEngine,
    ask,
    delta,
    engine_of,
    make_worker,
    until,
)

STREAM = "/worker_generate_stream"
CHAT = "/v1/chat/completions"
QUESTION = {"prompt": "<image>What?", "images": [RED_PICTURE]}
MESSAGES = [{"role": "user", "content": "secret question"}]


@pytest.fixture(scope="module", autouse=True)
def _decoder() -> None:
    """Torch takes seconds to be imported, which no test's patience should be spent on."""
    import models.vision.rgb  # noqa: F401


async def never() -> None:
    await asyncio.sleep(NEVER_S)


class Lines(logging.Handler):
    """A log's lines as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(self.format(record))

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text]


def logged(worker: ModelWorker) -> Lines:
    lines = Lines()
    worker.requests.listeners.append(AccessLog(worker.model_name, lines).write)
    return lines


async def line_of(worker: ModelWorker, path: str, body: object, **options: Any) -> dict[str, Any]:
    lines = logged(worker)
    await ask(build_http_app(worker), path, json.dumps(body).encode(), **options)
    (line,) = lines.parsed
    return line


async def test_a_line_has_what_one_wants_to_know() -> None:
    now = time.monotonic()
    timing = Timing(now, now + 0.25, now + 0.75, now + 1.0, now + 1.0)
    script = [replace(delta("red"), timing=timing), delta(" dot")]
    worker = make_worker(FakeEngine(script))
    line = await line_of(worker, STREAM, QUESTION, headers={"x-request-id": "mine"})
    moment, ttft, total = line.pop("time"), line.pop("ttft_ms"), line.pop("total_ms")
    assert line == {
        "request_id": "mine", "method": "POST", "route": STREAM, "status": 200,
        "model": "demo-4bit-AWQ", "images": 1, "choices": 1, "prompt_tokens": 7,
        "cached_tokens": 0, "generated_tokens": 2, "queue_ms": 500.0, "finish_reason": "stop",
        "error_type": None, "client_gone": False,
    }  # fmt: skip
    assert moment.endswith("+00:00")
    assert 100 < ttft <= 1000
    assert 0 < total < ttft  # the first token was claimed to come in the future


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_share_a_prompt_and_its_pictures(stream: bool) -> None:
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED_PICTURE}"}}
    messages = [{"role": "user", "content": [url, {"type": "text", "text": "What?"}]}]
    line = await line_of(make_worker(), CHAT, {"messages": messages, "n": 2, "stream": stream})
    assert (line["images"], line["choices"]) == (1, 2)
    assert (line["prompt_tokens"], line["generated_tokens"]) == (7, 6)
    assert (line["finish_reason"], line["status"]) == ("stop", 200)


async def test_prompts_in_a_list_count_each() -> None:
    line = await line_of(make_worker(), "/v1/completions", {"prompt": ["a", "b"], "n": 2})
    assert (line["choices"], line["prompt_tokens"], line["generated_tokens"]) == (4, 14, 12)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (STREAM, {"prompt": 1}, 200, "invalid_request"),
        (CHAT, {"messages": 1}, 400, "invalid_request"),
        (CHAT, {"messages": MESSAGES, "model": "other"}, 404, "invalid_request"),
        ("/worker_generate", {}, 200, "invalid_request"),
        ("/chat/completions", {"messages": 1}, 400, "invalid_request"),
        ("/tokenize", {"prompt": 1}, 400, "invalid_request"),
        ("/nowhere", {}, 404, None),
    ],
)
async def test_refusals_are_logged_by_kind(
    path: str, body: object, status: int, kind: str | None
) -> None:
    line = await line_of(make_worker(), path, body)
    assert (line["route"], line["status"], line["error_type"]) == (path, status, kind)
    assert (line["choices"], line["generated_tokens"], line["finish_reason"]) == (0, 0, None)


@pytest.mark.parametrize(("path", "status"), [(STREAM, 200), (CHAT, 503)])
async def test_whoever_finds_the_door_full_is_logged_so(path: str, status: int) -> None:
    worker = make_worker(max_num_seqs=1, max_waiting=0)
    with worker.door.enter():
        line = await line_of(worker, path, {"prompt": "hi", "messages": MESSAGES})
    assert (line["status"], line["error_type"]) == (status, "overloaded")


@pytest.mark.parametrize("path", [STREAM, CHAT])
@pytest.mark.parametrize(
    ("error", "kind"), [(EngineFault("oh"), "engine"), (KeyError("/secret"), "internal")]
)
async def test_an_answer_that_fails_midway(path: str, error: Exception, kind: str) -> None:
    body = {"prompt": "hi", "messages": MESSAGES, "stream": True}
    line = await line_of(make_worker(FakeEngine(["A ", error])), path, body)
    assert (line["error_type"], line["finish_reason"]) == (kind, "error")
    assert (line["generated_tokens"], line["client_gone"]) == (1, False)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(
    "body",
    [{"prompt": "hi"}, {"messages": MESSAGES}, {"messages": MESSAGES, "stream": True}],
    ids=["worker", "whole", "streamed"],
)
async def test_a_client_that_leaves_is_gone(body: dict[str, Any], spec_version: str) -> None:
    worker = make_worker(FakeEngine(["A ", never]), sign_of_life_s=0.01)
    lines = logged(worker)
    path = STREAM if "prompt" in body else CHAT
    connection = Connection(
        build_http_app(worker), path, json.dumps(body).encode(), spec_version=spec_version
    )
    await until(lambda: engine_of(worker).running == 1)
    await asyncio.sleep(0.02)
    connection.leave()
    await connection.end()
    (line,) = lines.parsed
    assert (line["client_gone"], line["finish_reason"]) == (True, "abort")
    assert line["error_type"] is None


async def test_a_client_that_leaves_while_it_uploads() -> None:
    worker = make_worker()
    lines = logged(worker)
    connection = Connection(build_http_app(worker), STREAM, None)
    await asyncio.sleep(0.02)
    connection.leave()
    await connection.end()
    (line,) = lines.parsed
    assert (line["client_gone"], line["error_type"]) == (True, "aborted")


async def test_a_request_that_the_server_cancels_is_gone_too() -> None:
    worker = make_worker(FakeEngine(["A ", never]))
    lines = logged(worker)
    connection = Connection(build_http_app(worker), STREAM, b'{"prompt": "hi"}')
    await until(lambda: engine_of(worker).running == 1)
    connection.task.cancel()
    await asyncio.gather(connection.task, return_exceptions=True)
    assert [line["client_gone"] for line in lines.parsed] == [True]


async def test_ray_serves_receive_that_raises_says_the_same() -> None:
    log = RequestLog()
    closed: list[RequestEntry] = []
    log.listeners.append(closed.append)

    async def cancelled() -> Any:
        raise RuntimeError("Task was cancelled")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(RuntimeError):
        await LoggedApp(app, log, sends_request_id=True)(scope, cancelled, cancelled)
    assert [(entry.client_gone, entry.error_type) for entry in closed] == [(True, None)]


async def test_requests_side_by_side_keep_to_themselves() -> None:
    worker = make_worker()
    lines = logged(worker)
    app = build_http_app(worker)
    bodies = [{"prompt": "<image>" * i, "images": [RED_PICTURE] * i} for i in range(4)]
    await asyncio.gather(
        *(ask(app, STREAM, json.dumps(b).encode(), headers={"x-request-id": str(i)})
          for i, b in enumerate(bodies))
    )  # fmt: skip
    assert {line["request_id"]: line["images"] for line in lines.parsed} == {
        str(i): i for i in range(4)
    }


async def test_probes_are_logged_only_when_they_fail() -> None:
    worker = make_worker()
    lines = logged(worker)
    app = build_http_app(worker)
    for path, method in (("/health", "GET"), ("/ping", "GET"), ("/worker_get_status", "POST")):
        await ask(app, path, method=method)
    assert lines.text == []
    worker.drain()
    await ask(app, "/health", method="GET")
    assert [(line["route"], line["status"]) for line in lines.parsed] == [("/health", 503)]


# ---- content ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [(STREAM, {"prompt": "<image>secret question", "images": [RED_PICTURE]}),
     (CHAT, {"messages": MESSAGES})],
)  # fmt: skip
async def test_content_stays_out_unless_it_is_asked_for(path: str, body: dict[str, Any]) -> None:
    for keeps in (False, True):
        worker = make_worker(FakeEngine(["secret ", "answer"]), log_content=keeps)
        lines = logged(worker)
        await ask(build_http_app(worker), path, json.dumps(body).encode())
        (text,) = lines.text
        assert ("secret question" in text, "secret answer" in text) == (keeps, keeps)
        assert RED_PICTURE[:40] not in text


async def test_a_path_of_any_kind_cannot_break_or_flood_the_log() -> None:
    line = await line_of(make_worker(), "/a\n{}" + "x" * 5000, {})
    assert line["route"].startswith("/a\n{}") and len(line["route"]) == 200


# ---- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "method"),
    [(STREAM, "POST"), (CHAT, "POST"), ("/v1/models", "GET"), ("/", "GET"), ("/health", "GET"),
     ("/nowhere", "GET"), ("/worker_generate", "POST"), ("/chat/completions", "POST")],
)  # fmt: skip
async def test_every_route_sends_the_id_back(path: str, method: str) -> None:
    app = build_http_app(make_worker())
    body = json.dumps({"prompt": "hi", "messages": MESSAGES, "stream": True}).encode()
    answer = await ask(app, path, body, method=method, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    answer = await ask(app, path, body, method=method)
    assert len(answer.headers["x-request-id"]) == 32


async def test_behind_ray_serve_its_proxy_sends_it() -> None:
    app = build_http_app(make_worker(), sends_request_id=False)
    answer = await ask(app, "/v1/models", method="GET", headers={"x-request-id": "abc"})
    assert "x-request-id" not in answer.headers


def test_ids_are_taken_as_far_as_they_do_no_harm() -> None:
    assert request_id_of("req_1:2/3+4=5@x.y-z") == "req_1:2/3+4=5@x.y-z"
    assert request_id_of('a b\r\n"c"\x1b[31m') == "abc31m"
    assert request_id_of("x" * 1000) == "x" * 128
    assert request_id_of(None) != request_id_of("") != request_id_of("\n\u202e")


# ---- handles ------------------------------------------------------------------------------------


async def test_calls_through_handles_are_logged_with_serves_id() -> None:
    worker = make_worker()
    lines = logged(worker)
    answer = worker.generate({"prompt": "hi"})
    pieces = [p async for p in worker.requests.streamed("generate", lambda: "serve-1", answer)]
    assert pieces[-1]["finish_reason"] == "stop"
    (line,) = lines.parsed
    assert (line["method"], line["route"], line["status"]) == ("handle", "generate", None)
    assert (line["request_id"], line["generated_tokens"]) == ("serve-1", 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_through_a_handle_is_open_until_its_last_chunk(stream: bool) -> None:
    worker = make_worker()
    lines = logged(worker)
    chat = worker.chat({"messages": MESSAGES, "stream": stream})
    answer = await worker.requests.called("chat", lambda: "c", chat)
    if stream:
        assert lines.text == []
        assert [chunk async for chunk in answer]
    (line,) = lines.parsed
    assert (line["route"], line["generated_tokens"]) == ("chat", 3)


async def test_what_a_handle_raises_is_logged_by_kind() -> None:
    worker = make_worker()
    lines = logged(worker)
    with pytest.raises(InvalidRequest):
        await worker.requests.called("chat", str, worker.chat({}))
    with pytest.raises(InvalidRequest):
        await anext(worker.requests.streamed("generate", str, worker.generate({})))
    assert [line["error_type"] for line in lines.parsed] == ["invalid_request"] * 2


async def test_a_method_inside_a_logged_request_is_no_request_of_its_own() -> None:
    log = RequestLog()
    closed: list[RequestEntry] = []
    log.listeners.append(closed.append)

    async def inner() -> Any:
        yield 1

    async def outer() -> Any:
        async for item in log.streamed("inner", str, inner()):
            yield item

    assert [i async for i in log.streamed("outer", str, outer())] == [1]
    assert [entry.route for entry in closed] == ["outer"]


async def test_a_handles_caller_that_leaves_is_gone() -> None:
    worker = make_worker(FakeEngine(["A ", never]))
    lines = logged(worker)
    pieces = worker.requests.streamed("generate", str, worker.generate({"prompt": "hi"}))
    await anext(pieces)
    await pieces.aclose()
    (line,) = lines.parsed
    assert (line["client_gone"], line["finish_reason"]) == (True, "abort")
    assert worker.door.count == engine_of(worker).running == 0


# ---- where it goes ------------------------------------------------------------------------------


@contextmanager
def serve_logs_to(path: Path | None) -> Iterator[None]:
    logger = logging.getLogger("ray.serve")
    before, logger.handlers = logger.handlers, []
    if path is not None:
        logger.addHandler(MemoryHandler(1, target=logging.FileHandler(path)))
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers = before


def test_the_file_is_beside_ray_serves_own(tmp_path: Path) -> None:
    with serve_logs_to(tmp_path / "replica_app_ModelWorker_abc.log"):
        write, where = open_access_log("file", "m")
    assert where == str(tmp_path / "access_app_ModelWorker_abc.jsonl")
    for status in (200, 400):
        write(RequestEntry(route="/x", status=status))
    lines = Path(where).read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == [200, 400]


def test_without_such_a_file_it_goes_to_the_console() -> None:
    with serve_logs_to(None):
        _, where = open_access_log("file", "m")
    assert where == "console"


def test_off_is_off(tmp_path: Path) -> None:
    with serve_logs_to(tmp_path / "replica_a.log"):
        write, where = open_access_log("off", "m")
        write(RequestEntry(route="/x", status=200))
    assert where == "off" and not list(tmp_path.glob("access*"))


def test_the_usage_of_an_answer_that_never_ended_is_that_of_its_last_piece() -> None:
    entry = RequestEntry()

    async def deltas() -> Any:
        yield GenerationDelta("r", text="a", usage=Usage(7, 1))
        yield GenerationDelta("r", text="b", usage=Usage(7, 2))
        await never()

    async def read() -> None:
        watched = entry.watched(deltas())
        await anext(watched)
        await anext(watched)
        await watched.aclose()

    asyncio.run(read())
    line = entry.as_json("m")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (7, 2)
    assert line["finish_reason"] == "abort"
