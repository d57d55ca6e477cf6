"""Python callers: the same methods through a DeploymentHandle."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray import serve

from models.demo import simple_scene
from models.errors import InvalidRequest
from tests.serve.worker import Worker, base64_of, prompt_of, records_of

QUESTION: dict[str, Any] = {
    "prompt": prompt_of("What is in this image?"), "temperature": 0, "max_new_tokens": 64,
    "images": [base64_of(simple_scene("purple", "ring"))],
}  # fmt: skip
ANSWER = "The image shows a purple ring."


@pytest.fixture(scope="module")
def handle(demo: Worker) -> Any:
    return serve.get_app_handle("demo").options(stream=True)


def test_generate_streams_pieces_by_dict_and_by_keywords(handle: Any) -> None:
    for stream in (handle.generate.remote(QUESTION), handle.generate.remote(**QUESTION)):
        pieces = list(stream)
        assert "".join(piece["text"] for piece in pieces) == ANSWER
        assert [piece["finish_reason"] for piece in pieces][-1] == "stop"
        assert pieces[-1]["usage"]["completion_tokens"] > 3


def test_generate_takes_the_pictures_bytes(handle: Any) -> None:
    import base64

    images = [base64.b64decode(image) for image in QUESTION["images"]]
    pieces = handle.generate.remote(QUESTION, images=images)
    assert "".join(piece["text"] for piece in pieces) == ANSWER


def test_generate_stream_gives_the_protocols_records(handle: Any) -> None:
    records = list(handle.generate_stream.remote(QUESTION))
    assert records[0]["text"] == QUESTION["prompt"]
    assert records[-1]["text"] == QUESTION["prompt"] + ANSWER


def test_generate_stream_gate_gives_bytes_and_errors_as_records(handle: Any) -> None:
    whole = b"".join(handle.generate_stream_gate.remote(QUESTION))
    assert records_of(whole)[-1]["text"] == QUESTION["prompt"] + ANSWER
    (error,) = list(handle.generate_stream_gate.remote({"prompt": 1}))
    assert json.loads(error[:-1])["error_type"] == "invalid_request"


def test_generate_raises_what_is_wrong(handle: Any) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        list(handle.generate.remote(prompt="Hi", temperature="hot"))


def test_status_and_queue_length(demo: Worker) -> None:
    plain = serve.get_app_handle("demo")
    assert plain.get_status.remote().result()["model_names"] == ["llava-demo-4bit-AWQ"]
    assert plain.get_queue_length.remote().result() == 0


def test_from_another_deployment(demo: Worker) -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Caller:
        async def __call__(self, question: dict[str, Any]) -> str:
            handle = serve.get_app_handle("demo").options(stream=True)
            return "".join([piece["text"] async for piece in handle.generate.remote(question)])

    caller = serve.run(Caller.bind(), name="caller", route_prefix=None)
    try:
        assert caller.remote(QUESTION).result(timeout_s=60) == ANSWER
    finally:
        serve.delete("caller")


def test_a_caller_that_stops_reading_frees_the_place(handle: Any, demo: Worker) -> None:
    long = QUESTION | {"max_new_tokens": 900, "ignore_eos": True}
    stream = handle.generate.remote(long)
    next(iter(stream))
    stream.cancel()
    demo.wait_until_empty()
