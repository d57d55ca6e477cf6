"""The OpenAI routes over HTTP: shapes, statuses, streams, and clients that leave.

What vLLM's test_vision and test_chat_error and llama.cpp's test_vision_api ask of a server is asked
here as well.
"""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image

from deployments.http_app import build_http_app
from deployments.model_worker import ModelWorker
from models import GenerationDelta, Guide
from models.errors import (
    EngineDead,
    EngineFault,
    EngineOverloaded,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
)
from models.prompts import get_template
from tests.unit.deployments.harness import (
    PATIENCE_S,
    PROMPT_TOKENS,
    RED_PICTURE,
    Connection,
    FakeEngine,
    ask,
    encoded,
    engine_of,
    make_worker,
    until,
)
from tests.unit.deployments.openai.asking import (
    CHAT,
    COMPLETIONS,
    DATA_URL,
    HI,
    about,
    forever,
    image,
    post,
    refused,
    texts,
)  # fmt: skip
from tests.unit.deployments.test_image_fetcher import answering, host


class TestWhole:
    async def test_a_chat(self) -> None:
        answer = await post(make_worker(), model="demo")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        body = answer.json
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["model"] == "demo"
        (choice,) = body["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == "A red circle."
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert body["usage"] == {
            "prompt_tokens": PROMPT_TOKENS, "completion_tokens": 3,
            "total_tokens": PROMPT_TOKENS + 3, "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip

    async def test_a_completion(self) -> None:
        answer = await post(make_worker(), COMPLETIONS, prompt="It is")
        body = answer.json
        assert body["object"] == "text_completion"
        assert body["choices"][0]["text"] == "A red circle."
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["model"] == "demo-4bit-AWQ"

    async def test_the_conversation_is_written_with_the_models_own_template(self) -> None:
        worker = make_worker()
        await post(
            worker,
            messages=[
                {"role": "system", "content": "Be kind."},
                *about(image(), {"type": "text", "text": "What?"}),
                {"role": "assistant", "content": "A circle."},
                *about("And now?", image()),
            ],
            stop=["x"],
        )
        (prompt, images, params, queue_timeout_s), *_ = engine_of(worker).asked
        assert prompt == (
            "Be kind. USER: <image>\nWhat? ASSISTANT: A circle.</s>"
            "USER: And now?\n<image> ASSISTANT:"
        )
        assert [picture.size for picture in images] == [(8, 6), (8, 6)]
        assert params.stop == ("x", "</s>")
        assert queue_timeout_s == worker.config.queue_timeout_s

    async def test_without_the_models_turn(self) -> None:
        worker = make_worker()
        await post(worker, add_generation_prompt=False)
        assert not engine_of(worker).asked[0][0].endswith("ASSISTANT:")

    async def test_a_place_for_a_picture_cannot_be_typed(self) -> None:
        worker = make_worker()
        answer = await post(worker, messages=about("Is <image> HTML?", image()))
        assert answer.status == 200
        assert engine_of(worker).asked[0][0].count("<image>") == 1
        assert (await post(worker, messages=about("Is <image> HTML?"))).status == 200

    async def test_echo_begins_with_the_prompt(self) -> None:
        answer = await post(make_worker(), COMPLETIONS, prompt=["a ", "b "], n=2, echo=True)
        assert [choice["text"] for choice in answer.json["choices"]] == [
            "a A red circle.", "a A red circle.", "b A red circle.", "b A red circle.",
        ]  # fmt: skip

    async def test_a_prompt_of_token_ids_reaches_the_engine_as_it_is(self) -> None:
        worker = make_worker()
        answer = await post(worker, COMPLETIONS, prompt=[[104, 105], [256]], echo=True)
        assert [prompt for prompt, *_ in engine_of(worker).asked] == [(104, 105), (256,)]
        texts = [choice["text"] for choice in answer.json["choices"]]
        assert texts == ["hiA red circle.", "A red circle."]
        error = await refused(worker, 400, COMPLETIONS, prompt=[257], echo=True)
        assert error["param"] == "prompt"

    async def test_no_tokens_at_all(self) -> None:
        answer = await post(make_worker(), COMPLETIONS, prompt="a", echo=True, max_tokens=0)
        assert answer.json["choices"][0]["text"] == "a"
        assert answer.json["choices"][0]["finish_reason"] == "length"

    async def test_choices_have_seeds_of_their_own_and_count_the_prompt_once(self) -> None:
        worker = make_worker()
        answer = await post(worker, messages=about("a", image()), n=3, seed=(1 << 63) - 2)
        assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]
        assert answer.json["usage"]["prompt_tokens"] == PROMPT_TOKENS
        assert answer.json["usage"]["completion_tokens"] == 9
        seeds = [params.seed for _, _, params, _ in engine_of(worker).asked]
        assert seeds == [(1 << 63) - 2, (1 << 63) - 1, -(1 << 63)]

    async def test_a_guide_reaches_the_engine(self) -> None:
        worker = make_worker()
        await post(worker, response_format={"type": "json_object"})
        assert engine_of(worker).asked[0][2].guide == Guide("json_object")

    async def test_the_reason_to_stop_is_told_where_the_request_gave_it(self) -> None:
        for stop, told in (["###", "###"], [None, None]):
            engine = FakeEngine(
                [GenerationDelta("r", "A", finish_reason="stop", stop_reason="###")]
            )
            engine.template = get_template("llava_v0")  # ends at ### by itself
            answer = await post(make_worker(engine), stop=stop)
            assert answer.json["choices"][0]["stop_reason"] == told

    async def test_load_tests_go_on_after_the_templates_end(self) -> None:
        worker = make_worker()
        await post(worker, ignore_eos=True)
        assert engine_of(worker).asked[0][2].stop == ()


class TestStreamed:
    async def test_role_first_then_text_and_exactly_one_finish_reason(self) -> None:
        answer = await post(make_worker(), stream=True)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        events = answer.events
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert texts(events) == "A red circle."
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons[-1] == "stop"
        assert set(reasons[:-1]) == {None}
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert len({event["id"] for event in events}) == 1
        assert not any("usage" in event for event in events)

    async def test_the_same_text_as_whole(self) -> None:
        script = ["\u732b ", "and ", "\u2028 ", "\U0001f436"]
        whole = await post(make_worker(FakeEngine(script)))
        streamed = await post(make_worker(FakeEngine(script)), stream=True)
        assert texts(streamed.events) == whole.json["choices"][0]["message"]["content"]

    async def test_usage_comes_last_and_without_choices(self) -> None:
        answer = await post(make_worker(), stream=True, stream_options={"include_usage": True})
        *others, last = answer.events
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == PROMPT_TOKENS + 3
        assert {event["usage"] for event in others} == {None}

    async def test_continuous_usage_is_in_every_chunk(self) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await post(make_worker(), stream=True, stream_options=options)
        used = [event["usage"]["completion_tokens"] for event in answer.events]
        assert used[0] == 0  # with the role
        assert used[-1] == used[-2] == 3
        assert all(earlier < later for earlier, later in pairwise(used[:-1]))
        assert {event["usage"]["prompt_tokens"] for event in answer.events} == {PROMPT_TOKENS}

    async def test_continuous_usage_knows_the_prompt_whichever_choice_comes_first(self) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await post(make_worker(), stream=True, stream_options=options, n=3)
        assert {event["usage"]["prompt_tokens"] for event in answer.events} == {PROMPT_TOKENS}

    async def test_several_choices_share_the_stream(self) -> None:
        answer = await post(make_worker(), stream=True, n=3)
        events = answer.events
        for index in range(3):
            own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
            assert own[0]["delta"]["role"] == "assistant"
            assert texts(events, index) == "A red circle."
            assert [choice["finish_reason"] for choice in own].count("stop") == 1

    async def test_a_completion(self) -> None:
        answer = await post(make_worker(), COMPLETIONS, prompt="a ", stream=True, echo=True)
        events = answer.events
        assert "".join(e["choices"][0]["text"] for e in events) == "a A red circle."
        assert [e["choices"][0]["finish_reason"] for e in events].count("stop") == 1
        assert {event["object"] for event in events} == {"text_completion"}

    async def test_signs_of_life_while_it_waits(self) -> None:
        worker = make_worker(FakeEngine([forever]), sign_of_life_s=0.01)
        connection = Connection(
            build_http_app(worker), CHAT, json.dumps({"messages": HI, "stream": True}).encode()
        )
        await until(lambda: connection.body.count(b"\n\n:") >= 2)
        assert connection.status == 200
        assert b'"role": "assistant"' in connection.body
        connection.leave()
        await connection.end()

    async def test_the_engine_is_asked_for_so_many_chunks_a_second(self) -> None:
        worker = make_worker(max_records_per_s=20)
        await post(worker, stream=True)
        await post(worker)  # of which nobody sees a piece
        assert engine_of(worker).intervals == [1 / 20, 1.0]


class TestPictures:
    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB", "1", "CMYK"])
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    async def test_of_every_mode(self, mode: str, kind: str) -> None:
        if (mode in {"P", "RGBA"} and kind == "JPEG") or (mode == "CMYK" and kind == "PNG"):
            pytest.skip("no such file")
        picture = encoded(Image.new(mode, (9, 7)), kind)
        worker = make_worker()
        url = f"data:image/{kind.lower()};base64,{picture}"
        assert (await post(worker, messages=about("?", image(url)))).status == 200
        (given,) = engine_of(worker).asked[0][1]
        assert (given.mode, given.size) == ("RGB", (9, 7))

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 3)])
    async def test_of_every_shape(self, size: tuple[int, int]) -> None:
        worker = make_worker()
        url = encoded(Image.new("RGB", size))  # bare base64
        assert (await post(worker, messages=about(image(url)))).status == 200

    @pytest.mark.parametrize(
        "url",
        ["data:image/png;base64,AAAA", "data:image/png,AAAA", "nonsense", "", "/etc/passwd",
         "file:///etc/passwd", "http://127.0.0.1/a.png", "https://example.org/a.png",
         DATA_URL[:-40], "data:video/mp4;base64,AAAA"],
    )  # fmt: skip
    @pytest.mark.parametrize("stream", [False, True])
    async def test_that_are_none_are_refused_by_their_place(self, url: str, stream: bool) -> None:
        worker = make_worker()
        messages = about("a", image(), image(url))
        error = await refused(worker, 400, messages=messages, stream=stream)
        assert error["param"] == "messages[0].content[2].image_url"
        assert error["type"] == "BadRequestError"
        assert (await post(worker)).status == 200

    async def test_too_many_are_refused_and_the_server_still_answers(self) -> None:
        worker = make_worker(max_images=2)
        error = await refused(worker, 400, messages=about("a", *[image()] * 3))
        assert "at most 2" in error["message"]
        assert (await post(worker, messages=about("a", *[image()] * 2))).status == 200

    async def test_by_url_from_a_host_that_is_allowed(self) -> None:
        import base64

        async with host(answering(base64.b64decode(RED_PICTURE))) as address:
            worker = make_worker(allowed_image_hosts=[address])
            url = f"http://{address}/a.png"
            blue = encoded(Image.new("RGB", (3, 2)))
            answer = await post(worker, messages=about(image(blue), image(url), image(blue)))
            assert answer.status == 200
            sizes = [picture.size for picture in engine_of(worker).asked[0][1]]
            assert sizes == [(3, 2), (8, 6), (3, 2)]
            other = await refused(worker, 400, messages=about(image("http://example.org/a.png")))
            assert other["param"] == "messages[0].content[0].image_url"

    @pytest.mark.parametrize(
        ("upstream", "status", "type_"),
        [(404, 422, "UnprocessableEntityError"), (500, 502, "BadGatewayError")],
    )
    async def test_that_a_host_does_not_give(self, upstream: int, status: int, type_: str) -> None:
        async with host(answering(b"", status=upstream)) as address:
            worker = make_worker(allowed_image_hosts=[address])
            for stream in (False, True):
                messages = about(image(f"http://{address}/a"))
                error = await refused(worker, status, messages=messages, stream=stream)
                assert error["type"] == type_

    async def test_while_they_are_fetched_the_request_counts_as_waiting(self) -> None:
        async def handler(request: Any) -> Any:
            await forever()

        async with host(handler) as address:
            worker = make_worker(allowed_image_hosts=[address])
            body = {"messages": about(image(f"http://{address}/a"))}
            connection = Connection(build_http_app(worker), CHAT, json.dumps(body).encode())
            await until(lambda: worker.get_queue_length() == 1)
            connection.leave()
            await connection.end()
            assert worker.get_queue_length() == 0


class TestErrors:
    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"null", b'"hi"', b"1", b"\xff", b"[" * 50_000]
    )
    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
    async def test_a_body_that_is_no_object(self, path: str, body: bytes) -> None:
        answer = await ask(build_http_app(make_worker()), path, body)
        assert answer.status == 400
        assert answer.json["error"]["param"] == "body"

    async def test_a_body_that_is_too_large(self) -> None:
        app = build_http_app(make_worker())
        answer = await ask(app, CHAT, b"{", headers={"Content-Length": str(100 << 20)})
        assert (answer.status, answer.json["error"]["code"]) == (413, 413)

    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_another_model(self, path: str) -> None:
        error = await refused(make_worker(), 404, path, model="gpt-4", prompt="a", messages=HI)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
        assert "demo-4bit-AWQ" in error["message"]

    @pytest.mark.parametrize("model", ["demo-4bit-AWQ", "demo", "", None])
    async def test_names_of_the_model(self, model: str | None) -> None:
        assert (await post(make_worker(), model=model)).status == 200

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("error", "status", "type_"),
        [
            (InvalidRequest("prompt", "is too long"), 400, "BadRequestError"),
            (EngineOverloaded("full"), 503, "ServiceUnavailableError"),
            (RequestTimeout("waited too long"), 503, "ServiceUnavailableError"),
            (RequestAborted("taken back"), 503, "ServiceUnavailableError"),
            (EngineDead("has stopped"), 503, "ServiceUnavailableError"),
            (EngineFault("out of memory"), 500, "InternalServerError"),
            (RuntimeError("secret at 0xdeadbeef in /home/me"), 500, "InternalServerError"),
        ],
    )
    async def test_before_the_first_token_have_a_status(
        self, error: Exception, status: int, type_: str, stream: bool
    ) -> None:
        found = await refused(make_worker(FakeEngine([error])), status, stream=stream)
        assert found["type"] == type_
        assert "secret" not in found["message"]

    async def test_in_mid_stream_end_it_with_an_event(self) -> None:
        answer = await post(make_worker(FakeEngine(["A ", EngineFault("broken")])), stream=True)
        assert answer.status == 200
        *_, last = answer.events
        assert last["error"] == {
            "message": "broken", "type": "InternalServerError", "param": None, "code": 500,
        }  # fmt: skip
        assert answer.complete

    async def test_late_ones_too_once_signs_of_life_have_been_sent(self) -> None:
        script = [lambda: asyncio.sleep(0.1), RequestTimeout("waited too long")]
        answer = await post(make_worker(FakeEngine(script), sign_of_life_s=0.01), stream=True)
        assert answer.status == 200
        assert answer.events[-1]["error"]["code"] == 503

    async def test_one_choice_that_fails_fails_the_request(self) -> None:
        error = await refused(make_worker(FakeEngine(["A", EngineFault("broken")])), 500, n=2)
        assert error["message"] == "broken"

    async def test_a_form_that_cannot_be_compiled_is_named_as_it_was_sent(self) -> None:
        for fields, param in (
            ({"guided_regex": "a"}, "guided_regex"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
        ):
            field = "guide" if param == "guided_regex" else "response_format"
            engine = FakeEngine([InvalidRequest(field, "cannot be followed")])
            assert (await refused(make_worker(engine), 400, **fields))["param"] == param

    async def test_overload_says_when_to_come_back(self) -> None:
        worker = make_worker(FakeEngine([forever]), max_num_seqs=1, max_waiting=1)
        app = build_http_app(worker)
        body = json.dumps({"messages": HI}).encode()
        holders = [Connection(app, CHAT, body) for _ in range(2)]
        await until(lambda: worker.get_queue_length() == 2)
        answer = await ask(app, CHAT, body)
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        for holder in holders:
            holder.leave()
            await holder.end()

    async def test_choices_need_a_place_each(self) -> None:
        worker = make_worker(FakeEngine([forever]), max_num_seqs=2, max_waiting=1)
        app = build_http_app(worker)
        holder = Connection(app, CHAT, json.dumps({"messages": HI, "n": 2}).encode())
        await until(lambda: worker.get_queue_length() == 2)
        answer = await ask(app, CHAT, json.dumps({"messages": HI, "n": 2}).encode())
        assert answer.status == 503
        error = await ask(app, CHAT, json.dumps({"messages": HI, "n": 4}).encode())
        assert (error.status, error.json["error"]["param"]) == (400, "n")
        holder.leave()
        await holder.end()
        assert worker.get_queue_length() == 0

    async def test_a_server_that_shuts_down(self) -> None:
        worker = make_worker()
        worker.drain()
        answer = await post(worker)
        assert answer.status == 503
        assert "shutting down" in answer.json["error"]["message"]


class TestLeaving:
    @pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
    @pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 3}, {"stream": True, "n": 3}])
    @pytest.mark.parametrize("script", [[forever], ["A ", forever]])
    async def test_frees_the_place(
        self, spec_version: str, more: dict[str, Any], script: list[Any]
    ) -> None:
        engine = FakeEngine(script)
        worker = make_worker(engine)
        body = json.dumps({"messages": HI, **more}).encode()
        connection = Connection(build_http_app(worker), CHAT, body, spec_version=spec_version)
        await until(lambda: engine.running == more.get("n", 1))
        if script[0] == "A " and "stream" in more:
            await until(lambda: b"A " in connection.body)
        connection.leave()
        await connection.end()
        assert worker.get_queue_length() == 0
        await until(lambda: engine.running == 0)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_so_does_a_task_that_is_cancelled(self, stream: bool) -> None:
        """As Ray Serve does with the requests of clients that have left."""
        engine = FakeEngine(["A ", forever])
        worker = make_worker(engine)
        body = json.dumps({"messages": HI, "stream": stream}).encode()
        connection = Connection(build_http_app(worker), CHAT, body)
        await until(lambda: engine.running == 1)
        connection.task.cancel()
        await asyncio.wait([connection.task], timeout=PATIENCE_S)
        assert worker.get_queue_length() == 0
        await until(lambda: engine.running == 0)

    async def test_while_the_request_is_prepared(self) -> None:
        engine = FakeEngine()
        engine.preparing = forever
        worker = make_worker(engine)
        connection = Connection(build_http_app(worker), CHAT, json.dumps({"messages": HI}).encode())
        await until(lambda: worker.get_queue_length() == 1)
        connection.leave()
        await connection.end()
        assert worker.get_queue_length() == 0
        assert engine.asked == []


class TestBesides:
    async def get(self, path: str, worker: ModelWorker | None = None) -> Connection:
        return await ask(build_http_app(worker or make_worker()), path, method="GET")

    async def test_models(self) -> None:
        worker = make_worker()
        body = (await self.get("/v1/models", worker)).json
        (model,) = body["data"]
        assert (model["id"], model["root"]) == ("demo-4bit-AWQ", "demo")
        assert model["max_model_len"] == FakeEngine.context_length
        assert "multimodal" in body["models"][0]["capabilities"]
        assert (await self.get("/v1/models/demo", worker)).json == model
        assert (await self.get("/models", worker)).json == body
        missing = await self.get("/v1/models/org/other")
        assert (missing.status, missing.json["error"]["type"]) == (404, "NotFoundError")

    async def test_ping_is_health(self) -> None:
        worker = make_worker()
        app = build_http_app(worker)
        for method in ("GET", "POST"):
            assert (await ask(app, "/ping", method=method)).status == 200
        engine_of(worker).dead = EngineDead("has stopped")
        assert (await ask(app, "/ping", method="GET")).status == 503

    async def test_version_and_load(self) -> None:
        assert (await self.get("/version")).json["version"]
        worker = make_worker(FakeEngine([forever]))
        app = build_http_app(worker)
        connection = Connection(app, CHAT, json.dumps({"messages": HI, "n": 2}).encode())
        await until(lambda: worker.get_queue_length() == 2)
        assert (await ask(app, "/load", method="GET")).json == {"server_load": 2}
        connection.leave()
        await connection.end()

    async def test_tokenize_and_back(self) -> None:
        worker = make_worker()
        answer = (await post(worker, "/tokenize", prompt="hi", return_token_strs=True)).json
        assert answer == {
            "count": 3, "max_model_len": 512, "tokens": [256, 104, 105],
            "token_strs": ["<s>", "h", "i"],
        }  # fmt: skip
        back = await post(worker, "/detokenize", tokens=answer["tokens"])
        assert back.json == {"prompt": "hi"}
        bare = (await post(worker, "/tokenize", prompt="hi", add_special_tokens=False)).json
        assert bare["tokens"] == [104, 105]

    async def test_tokenize_a_conversation(self) -> None:
        worker = make_worker()
        tokens = (await post(worker, "/tokenize", messages=HI)).json["tokens"]
        text = (await post(worker, "/detokenize", tokens=tokens)).json["prompt"]
        await post(worker)
        assert text == engine_of(worker).asked[0][0]

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 1}, "prompt"),
            ("/tokenize", {"prompt": "a" * 100_000}, "prompt"),
            ("/tokenize", {"messages": about("a", image())}, "messages"),
            ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
            ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": [9999]}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens"),
            ("/detokenize", {"tokens": [1] * 100_000}, "tokens"),
        ],
    )  # fmt: skip
    async def test_what_is_wrong_is_named(
        self, path: str, body: dict[str, Any], param: str
    ) -> None:
        answer = await post(make_worker(), path, **body)
        assert answer.status == (404 if param == "model" else 400)
        assert answer.json["error"]["param"] == param


class TestPythonCallers:
    async def test_a_whole_answer_is_an_object(self) -> None:
        answer = await make_worker().chat({"messages": HI})
        assert isinstance(answer, dict)
        assert answer["choices"][0]["message"]["content"] == "A red circle."

    async def test_a_streamed_one_an_iterator_of_chunks(self) -> None:
        worker = make_worker(sign_of_life_s=0.001)
        chunks = await worker.chat({"messages": HI, "stream": True})
        assert not isinstance(chunks, dict)
        found = [chunk async for chunk in chunks]
        assert texts(found) == "A red circle."
        assert worker.get_queue_length() == 0

    async def test_pictures_may_be_bytes(self) -> None:
        import base64

        worker = make_worker()
        await worker.chat({"messages": about("?", image(base64.b64decode(RED_PICTURE)))})
        assert engine_of(worker).asked[0][1][0].size == (8, 6)

    async def test_errors_are_raised(self) -> None:
        with pytest.raises(InvalidRequest, match="messages"):
            await make_worker().chat({})
        with pytest.raises(EngineFault):
            await make_worker(FakeEngine([EngineFault("broken")])).chat({"messages": HI})
