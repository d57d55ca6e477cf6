"""VILA's own /chat/completions: what its client (serving/query_nvila.py) sends and reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.http_app import build_http_app
from models.errors import EngineFault
from tests.unit.deployments.harness import (
    RED_PICTURE,
    Connection,
    FakeEngine,
    ask,
    engine_of,
    make_worker,
)

QUESTION: dict[str, Any] = {
    "model": "DEMO-AWQ",  # VILA writes VILA1.5-3B-AWQ where the folder is VILA1.5-3b-AWQ
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED_PICTURE}"}},
            ],
        }
    ],
}


async def post(engine: FakeEngine | None = None, **more: Any) -> Connection:
    body = json.dumps({**QUESTION, **more}).encode()
    return await ask(build_http_app(make_worker(engine)), "/chat/completions", body)


async def test_a_whole_answer_is_a_list_of_parts() -> None:
    body = (await post(FakeEngine([" A red ", "circle. "]))).json
    assert set(body) == {"id", "object", "created", "model", "choices"}
    assert body["object"] == "chat.completion"
    assert body["model"] == "DEMO-AWQ"
    assert body["choices"] == [
        {"message": {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}}
    ]


async def test_a_streamed_one_has_neither_roles_nor_reasons() -> None:
    events = (await post(stream=True)).events
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == "A red circle."
    for event in events:
        assert set(event) == {"id", "object", "created", "model", "choices"}
        assert [set(choice) for choice in event["choices"]] == [{"delta"}]
        assert set(event["choices"][0]["delta"]) == {"content"}


async def test_defaults_are_vilas() -> None:
    worker = make_worker()
    body = json.dumps({**QUESTION, "num_beams": 1, "use_cache": True}).encode()
    await ask(build_http_app(worker), "/chat/completions", body)
    params = engine_of(worker).asked[0][2]
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.2, 0.9, 512)
    more = {"temperature": 0, "max_tokens": 5, "n": 3, "use_cache": False}
    body = json.dumps({**QUESTION, **more}).encode()
    await ask(build_http_app(worker), "/chat/completions", body)
    (_, _, params, _) = engine_of(worker).asked[1]
    assert (params.temperature, params.max_new_tokens) == (0, 5)
    assert len(engine_of(worker).asked) == 2


@pytest.mark.parametrize(
    "more",
    [{"model": "VILA1.5-40B"}, {"messages": []}, {"num_beams": 4}, {"temperature": "hot"},
     {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]}],
)  # fmt: skip
async def test_an_error_is_one_string(more: dict[str, Any]) -> None:
    answer = await post(**more)
    assert answer.status == 400
    assert isinstance(answer.json["error"], str)
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{"])
async def test_so_is_that_of_a_body_that_is_none(body: bytes) -> None:
    answer = await ask(build_http_app(make_worker()), "/chat/completions", body)
    assert answer.status == 400
    assert isinstance(answer.json["error"], str)


async def test_and_that_of_a_stream() -> None:
    answer = await post(FakeEngine(["A ", EngineFault("broken")]), stream=True)
    assert answer.events[-1] == {"error": "broken"}
    answer = await post(FakeEngine([EngineFault("broken")]), stream=True)
    assert (answer.status, answer.json) == (500, {"error": "broken"})


async def test_openais_package_gets_errors_that_it_can_show() -> None:
    app, headers = build_http_app(make_worker()), {"X-Stainless-Lang": "python"}
    for body in (b"{", json.dumps({**QUESTION, "temperature": "hot"}).encode()):
        answer = await ask(app, "/chat/completions", body, headers=headers)
        assert answer.status == 400
        assert "message" in answer.json["error"]
    answer = await ask(app, "/chat/completions", json.dumps(QUESTION).encode(), headers=headers)
    assert isinstance(answer.json["choices"][0]["message"]["content"], list)


OPENAIS = pytest.mark.parametrize(
    "more",
    [
        {"max_completion_tokens": 9},
        {"stop": ["x"], "seed": 5},
        {"messages": [{"role": "system", "content": "Be kind."}, *QUESTION["messages"]]},
    ],
)  # fmt: skip


@OPENAIS
async def test_what_only_openais_clients_ask_for_gets_openais_answer(more: dict[str, Any]) -> None:
    """A client whose base address lacks /v1."""
    body = (await post(model="demo", **more)).json
    assert body["choices"][0]["message"]["content"] == "A red circle."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    events = (await post(model="demo", stream=True, **more)).events
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


@OPENAIS
async def test_and_openais_errors(more: dict[str, Any]) -> None:
    answer = await post(**{**more, "model": "demo", "temperature": "hot"})
    assert answer.status == 400
    assert answer.json["error"]["param"] == "temperature"


async def test_null_is_no_field() -> None:
    assert isinstance((await post(stop=None)).json["choices"][0]["message"]["content"], list)
