"""ModelWorker: from a request's JSON to records, and what becomes of its place in the line."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from deployments.model_worker import PROMPT_CHARS_PER_TOKEN
from models.errors import (
    EngineDead,
    EngineFault,
    EngineOverloaded,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
    TinyChatError,
)
from tests.unit.deployments.harness import (
    NEVER_S,
    PATIENCE_S,
    PROMPT_TOKENS,
    RED_PICTURE,
    FakeEngine,
    engine_of,
    gate_records,
    make_worker,
    parse_records,
    until,
)

UNICODE = "USER: 猫 \U0001f468\u200d\U0001f469 \r\n\t\0 e\u0301 \u202e <b> \\n  two  ASSISTANT:"


async def forever() -> None:
    await asyncio.sleep(NEVER_S)


async def next_record(records: Any) -> dict[str, Any]:
    record = await asyncio.wait_for(anext(records), PATIENCE_S)
    assert isinstance(record, dict)
    return record


class TestRecords:
    @pytest.mark.parametrize("prompt", ["", "hi", UNICODE])
    async def test_text_is_the_prompt_byte_for_byte_and_what_was_said_since(
        self, prompt: str
    ) -> None:
        worker = make_worker(FakeEngine(["猫 ", "and ", "dog"]))
        records = await gate_records(worker, {"prompt": prompt})
        texts = [record["text"] for record in records]
        assert texts[0] == prompt
        assert texts[-1] == prompt + "猫 and dog"
        for earlier, later in pairwise(texts):
            assert later.startswith(earlier)  # clients cut off what they have
        assert {record["error_code"] for record in records} == {0}

    async def test_without_echo_the_text_is_the_answer_alone(self) -> None:
        records = await gate_records(make_worker(), {"prompt": "hi", "echo": False})
        assert (records[0]["text"], records[-1]["text"]) == ("", "A red circle.")

    @pytest.mark.parametrize("reason", ["stop", "length"])
    async def test_only_the_last_record_has_a_finish_reason_and_all_of_the_usage(
        self, reason: str
    ) -> None:
        records = await gate_records(make_worker(FakeEngine(reason=reason)), {"prompt": "hi"})
        assert [record["finish_reason"] for record in records[:-1]] == [None] * (len(records) - 1)
        assert records[-1]["finish_reason"] == reason
        assert records[-1]["usage"] == {
            "prompt_tokens": PROMPT_TOKENS, "completion_tokens": 3,
            "total_tokens": PROMPT_TOKENS + 3,
        }  # fmt: skip

    async def test_the_first_record_does_not_wait_for_the_model(self) -> None:
        worker = make_worker(FakeEngine([forever]))
        records: Any = worker.generate_stream({"prompt": "hi"})
        assert (await next_record(records))["text"] == "hi"
        await records.aclose()

    async def test_while_nothing_comes_the_last_record_is_repeated(self) -> None:
        worker = make_worker(FakeEngine(["A ", forever]), sign_of_life_s=0.01)
        records: Any = worker.generate_stream({"prompt": "hi "})
        while (await next_record(records))["text"] != "hi A ":
            pass
        for _ in range(3):
            record = await next_record(records)
            assert (record["text"], record["finish_reason"]) == ("hi A ", None)
        await records.aclose()

    async def test_no_new_tokens_are_one_record(self) -> None:
        """The web client's slider goes down to 0, and the client fails without a record."""
        worker = make_worker(sign_of_life_s=0.001)
        request = {"prompt": "<image> hi", "images": [RED_PICTURE], "max_new_tokens": 0}
        (record,) = await gate_records(worker, request)
        assert (record["text"], record["finish_reason"]) == ("<image> hi", "length")
        assert record["usage"]["prompt_tokens"] == PROMPT_TOKENS
        (record,) = await gate_records(worker, {**request, "echo": False})
        assert record["text"] == ""

    async def test_an_answer_of_nothing_still_ends(self) -> None:
        records = await gate_records(make_worker(FakeEngine([])), {"prompt": "hi"})
        assert records[-1]["text"] == "hi"
        assert records[-1]["finish_reason"] == "stop"

    async def test_the_engine_is_asked_for_so_many_records_a_second(self) -> None:
        worker = make_worker(max_records_per_s=20)
        await gate_records(worker, {"prompt": ""})
        assert engine_of(worker).intervals == [1 / 20]

    async def test_what_comes_while_a_record_is_sent_shares_the_next(self) -> None:
        worker = make_worker(FakeEngine(["x"] * 500))
        records = await gate_records(worker, {"prompt": ""})
        assert records[-1]["text"] == "x" * 500
        assert len(records) < 10

    async def test_the_engine_gets_prompt_pictures_and_parameters(self) -> None:
        worker = make_worker(queue_timeout_s=33)
        await gate_records(
            worker,
            {"prompt": "<image> hi", "images": [RED_PICTURE], "temperature": 0.5, "top_k": 3},
        )
        ((prompt, (image,), params, timeout_s),) = engine_of(worker).asked
        assert (prompt, timeout_s) == ("<image> hi", 33)
        assert (params.temperature, params.top_k) == (0.5, 3)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), (255, 0, 0))


class TestErrors:
    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            ({}, "prompt"), ({"prompt": 5}, "prompt"), ([], "body"), (None, "body"),
            ({"prompt": "<image>"}, "images"),
            ({"prompt": "<image>", "images": ["QUJD"]}, "images[0]"),
            ({"prompt": "hi", "temperature": "hot"}, "temperature"),
            ({"prompt": "x" * (FakeEngine.context_length * PROMPT_CHARS_PER_TOKEN + 1)}, "prompt"),
        ],
    )  # fmt: skip
    async def test_a_wrong_request_is_told_what_is_wrong(self, request_: Any, field: str) -> None:
        worker = make_worker()
        records = await gate_records(worker, request_)
        assert records[-1]["error_code"] == 1
        assert records[-1]["error_type"] == "invalid_request"
        assert records[-1]["error_field"] == field
        assert all(record["error_code"] == 0 for record in records[:-1])
        assert engine_of(worker).asked == []  # the model was not bothered
        assert worker.get_queue_length() == 0

    @pytest.mark.parametrize("said", [[], ["A "], ["A ", "red "]])
    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (InvalidRequest("prompt", "is too long"), "invalid_request"),
            (RequestTimeout("waited too long"), "timeout"),
            (RequestAborted("taken back"), "aborted"),
            (EngineFault("out of memory"), "engine"),
            (EngineDead("closed"), "engine_dead"),
        ],
    )
    async def test_an_error_is_the_last_record_after_all_that_was_said(
        self, said: list[str], error: TinyChatError, kind: str
    ) -> None:
        worker = make_worker(FakeEngine([*said, error]))
        *records, last = await gate_records(worker, {"prompt": "hi "})
        assert (last["text"], last["error_code"], last["error_type"]) == (str(error), 1, kind)
        assert records[-1]["text"] == "hi " + "".join(said)
        assert {record["error_code"] for record in records} == {0}
        assert {record["finish_reason"] for record in records} == {None}
        assert worker.get_queue_length() == 0

    async def test_an_unexpected_error_is_a_record_that_gives_nothing_away(self) -> None:
        worker = make_worker(FakeEngine([RuntimeError("CUDA error at 0x7f /root/secret")]))
        *_, last = await gate_records(worker, {"prompt": "hi"})
        assert last["error_type"] == "internal"
        assert "secret" not in last["text"]
        assert "0x" not in last["text"]

    async def test_an_error_with_no_new_tokens_is_the_only_record(self) -> None:
        request = {"prompt": "<image>", "images": ["QUJD"], "max_new_tokens": 0}
        (record,) = await gate_records(make_worker(), request)
        assert record["error_field"] == "images[0]"

    async def test_callers_of_the_method_itself_get_exceptions(self) -> None:
        """As those of a DeploymentHandle do."""
        with pytest.raises(InvalidRequest):
            await next_record(make_worker().generate_stream({}))
        records = make_worker(FakeEngine([EngineFault("out of memory")])).generate_stream(
            {"prompt": "hi"}
        )
        with pytest.raises(EngineFault):
            async for _ in records:
                pass

    async def test_a_bad_request_harms_no_other(self) -> None:
        worker = make_worker()
        good, bad = {"prompt": "hi"}, {"prompt": "hi", "top_p": 7}
        results = await asyncio.gather(*(gate_records(worker, r) for r in [good, bad] * 2))
        assert [records[-1]["error_code"] for records in results] == [0, 1, 0, 1]


class TestDoor:
    @pytest.mark.parametrize("phase", ["unstarted", "first", "preparing", "waiting", "running"])
    @pytest.mark.parametrize("by", ["aclose", "cancel"])
    async def test_a_caller_that_leaves_frees_its_place_in_every_phase(
        self, phase: str, by: str
    ) -> None:
        engine = FakeEngine(["A ", forever] if phase == "running" else [forever])
        worker = make_worker(engine, sign_of_life_s=0.005)
        if phase == "preparing":
            engine.preparing = forever
        taken: list[bytes] = []
        stream: Any = worker.generate_stream_gate({"prompt": "hi "})

        async def consume() -> None:
            async for record in stream:
                taken.append(record)  # noqa: PERF401 - until it is cancelled

        if by == "cancel":
            consumer = asyncio.create_task(consume())
            await self.reach(phase, taken, engine)
            consumer.cancel()
            await asyncio.wait([consumer], timeout=PATIENCE_S)
            assert consumer.cancelled()
        else:
            while not self.reached(phase, taken, engine):
                taken.append(await asyncio.wait_for(anext(stream), PATIENCE_S))
        await stream.aclose()
        assert worker.get_queue_length() == 0
        await until(lambda: engine.running == 0)

    def reached(self, phase: str, taken: list[bytes], engine: FakeEngine) -> bool:
        texts = [record["text"] for record in parse_records(b"".join(taken))]
        return {
            "unstarted": True,
            "first": len(texts) >= 1,
            "preparing": len(texts) >= 3,
            "waiting": len(texts) >= 3 and engine.running == 1,
            "running": "hi A " in texts,
        }[phase]

    async def reach(self, phase: str, taken: list[bytes], engine: FakeEngine) -> None:
        await until(lambda: self.reached(phase, taken, engine))

    async def test_one_too_many_is_refused_and_the_others_go_on(self) -> None:
        ready = asyncio.Event()
        engine = FakeEngine([ready.wait, "A ", "circle."])
        worker = make_worker(engine, max_num_seqs=1, max_waiting=1)
        inside = [asyncio.create_task(gate_records(worker, {"prompt": "hi"})) for _ in range(2)]
        await until(lambda: worker.get_queue_length() == 2)
        (refused,) = await gate_records(worker, {"prompt": "hi"})
        assert (refused["error_code"], refused["error_type"]) == (1, "overloaded")
        with pytest.raises(EngineOverloaded):
            await next_record(worker.generate_stream({"prompt": "hi"}))
        assert worker.get_status()["queue_length"] == 2
        ready.set()
        for records in await asyncio.gather(*inside):
            assert records[-1]["text"] == "hiA circle."
        assert worker.get_queue_length() == 0
        assert (await gate_records(worker, {"prompt": "hi"}))[-1]["finish_reason"] == "stop"

    async def test_a_wrong_request_is_told_so_even_when_all_is_full(self) -> None:
        """It would only come back later, as wrong as before."""
        worker = make_worker(FakeEngine([forever]), max_num_seqs=1, max_waiting=0)
        holder: Any = worker.generate_stream({"prompt": "hi"})
        await next_record(holder)
        (record,) = await gate_records(worker, {"prompt": 5})
        assert record["error_type"] == "invalid_request"
        await holder.aclose()

    async def test_pictures_of_a_refused_request_are_not_decoded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(*_: Any) -> Any:
            raise AssertionError("decoded")

        worker = make_worker(FakeEngine([forever]), max_num_seqs=1, max_waiting=0)
        holder: Any = worker.generate_stream({"prompt": "hi"})
        await next_record(holder)
        monkeypatch.setattr("deployments.model_worker.decode_images", forbidden)
        (record,) = await gate_records(worker, {"prompt": "<image>", "images": [RED_PICTURE]})
        assert record["error_type"] == "overloaded"
        await holder.aclose()

    async def test_many_requests_in_any_order_leave_it_empty(self) -> None:
        worker = make_worker(FakeEngine(["a ", lambda: asyncio.sleep(0.001), "b"]), max_waiting=2)
        requests: list[Any] = [{"prompt": "hi"}, {"prompt": 5}, {"prompt": "<image>"}] * 20
        results = await asyncio.gather(*(gate_records(worker, request) for request in requests))
        codes = [records[-1]["error_code"] for records in results]
        assert len(codes) == 60
        assert 1 <= codes.count(0) <= 20
        assert worker.get_queue_length() == engine_of(worker).running == 0


class TestControl:
    async def test_the_status_is_what_controllers_read(self) -> None:
        status = make_worker().get_status()
        assert status == {"model_names": ["demo-4bit-AWQ"], "speed": 1, "queue_length": 0}

    async def test_the_stats_are_the_engines_and_the_doors(self) -> None:
        stats = make_worker(max_num_seqs=2, max_waiting=3).get_stats()
        assert (stats["queue_length"], stats["queue_limit"], stats["blocks_total"]) == (0, 5, 10)

    async def test_health_is_the_engines(self) -> None:
        worker = make_worker()
        worker.check_health()
        engine_of(worker).dead = EngineDead("the engine has died of RuntimeError")
        with pytest.raises(EngineDead):
            worker.check_health()

    async def test_warming_up_shows_the_model_a_picture(self) -> None:
        worker = make_worker()
        await worker.warm_up()
        ((prompt, images, params, _),) = engine_of(worker).asked
        assert prompt.count("<image>") == len(images) == 1
        assert (params.max_new_tokens, params.greedy) == (2, True)
        assert worker.get_queue_length() == 0

    @pytest.mark.parametrize(
        "options",
        [
            {"max_images": 0}, {"max_new_tokens_cap": 1, "default_max_new_tokens": 1},
            {"max_image_bytes": 1024}, {"max_image_pixels": 1024}, {"max_image_side": 32},
            {"max_request_pixels": 1024}, {"sign_of_life_s": 0.001},
        ],
    )  # fmt: skip
    async def test_warming_up_works_under_the_narrowest_limits(
        self, options: dict[str, Any]
    ) -> None:
        worker = make_worker(**options)
        await worker.warm_up()
        assert len(engine_of(worker).asked) == 1

    @pytest.mark.parametrize(
        "error", [EngineFault("no"), RequestTimeout("no"), RuntimeError("CUDA error")]
    )
    async def test_a_model_that_cannot_answer_does_not_start(self, error: Exception) -> None:
        with pytest.raises(type(error)):
            await make_worker(FakeEngine([error])).warm_up()

    async def test_closing_closes_the_engine_and_may_be_done_twice(self) -> None:
        worker = make_worker()
        await worker.close()
        assert engine_of(worker).closed
        await worker.close()
