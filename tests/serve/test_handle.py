"""Python callers: the same methods through a DeploymentHandle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from ray import serve

from models.demo import simple_scene
from models.errors import InvalidRequest
from tests.serve.worker import Worker, base64_of, prompt_of, records_of

ROOT = Path(__file__).resolve().parents[2]
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


def test_the_example_of_a_script_answers(demo: Worker, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    simple_scene("purple", "ring").save(file)
    finished = subprocess.run(
        [
            sys.executable, ROOT / "docs/examples/handle_driver.py", file,
            "What is in this image?", "demo",
        ],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert finished.stdout == f"{ANSWER}\n"


def test_the_example_of_another_deployment_answers(demo: Worker, tmp_path: Path) -> None:
    from docs.examples.handle_deployment import Captioner

    file = tmp_path / "picture.png"
    simple_scene("purple", "ring").save(file)
    caller = serve.run(Captioner.bind("demo"), name="caller", route_prefix="/caption")
    try:
        assert caller.caption.remote(file.read_bytes()).result(timeout_s=60) == ANSWER
        url = demo.url.replace("/demo", "/caption")
        assert requests.post(url, data=file.read_bytes(), timeout=60).text == ANSWER
    finally:
        serve.delete("caller")


def test_a_caller_that_stops_reading_frees_the_place(handle: Any, demo: Worker) -> None:
    long = QUESTION | {"max_new_tokens": 900, "ignore_eos": True}
    stream = handle.generate.remote(long)
    next(iter(stream))
    stream.cancel()
    demo.wait_until_empty()
