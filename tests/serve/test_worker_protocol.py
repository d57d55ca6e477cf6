"""`/worker_generate_stream` and `/worker_get_status` over HTTP, as existing clients use them."""

from __future__ import annotations

import http.client
import json
import time
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from models.demo import simple_scene
from tests.serve.worker import STREAM, Worker, base64_of, prompt_of, records_of

PICTURE = base64_of(simple_scene("red", "circle"))
LONG = {"ignore_eos": True, "temperature": 0}


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": prompt_of("What?"), "images": [PICTURE], "max_new_tokens": 16} | LONG | more


def test_every_record_is_json_closed_by_a_zero_byte_and_has_no_content_type(tiny: Worker) -> None:
    response = tiny.post(body())
    assert response.status_code == 200
    assert response.content.endswith(b"\0")
    assert "content-type" not in response.headers
    records = records_of(response.content)
    assert all(record["error_code"] == 0 for record in records)


def test_text_is_cumulative_and_begins_with_the_prompt_byte_for_byte(tiny: Worker) -> None:
    prompt = "  A  chat\n\n USER: <image> täglich 猫 ?  ASSISTANT: "
    texts = [record["text"] for record in tiny.records(body(prompt=prompt))]
    assert texts[0] == prompt
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(texts[-1]) > len(prompt)


def test_without_echo_only_the_answer_is_sent(tiny: Worker) -> None:
    with_echo = tiny.last(**body())["text"]
    without = tiny.last(**body(echo=False))["text"]
    assert with_echo == body()["prompt"] + without


def test_only_the_last_record_has_a_finish_reason_and_usage_counts(tiny: Worker) -> None:
    records = tiny.records(body(max_new_tokens=16))
    assert {record["finish_reason"] for record in records[:-1]} == {None}
    assert records[-1]["finish_reason"] == "length"
    usage = records[-1]["usage"]
    assert usage["completion_tokens"] == 16
    assert usage["prompt_tokens"] > 16  # the picture alone has so many
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_no_tokens_to_generate_gives_one_record_with_the_prompt(tiny: Worker) -> None:
    records = tiny.records(body(max_new_tokens=0))
    assert [record["text"] for record in records] == [body()["prompt"]]
    assert records[0]["finish_reason"] == "length"
    assert records[0]["error_code"] == 0


def test_tokens_default_to_256_and_are_capped_at_1024(deploy: Any, tiny_llava: Any) -> None:
    worker = deploy(
        "long", model_path=str(tiny_llava), max_new_tokens_cap=300, default_max_new_tokens=256
    )
    default = body()
    del default["max_new_tokens"]
    assert worker.last(**default)["usage"]["completion_tokens"] == 256
    capped = worker.last(**body(max_new_tokens=100_000))
    assert capped["usage"]["completion_tokens"] == 300
    assert capped["error_code"] == 0


def test_max_tokens_is_another_name_for_max_new_tokens(tiny: Worker) -> None:
    request = body(max_tokens=5)
    del request["max_new_tokens"]
    assert tiny.last(**request)["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("as_list", [False, True])
def test_the_text_ends_before_a_stop_string(tiny: Worker, as_list: bool) -> None:
    whole = tiny.last(**body(echo=False, max_new_tokens=40))["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    record = tiny.last(
        **body(echo=False, max_new_tokens=40, stop=[stop, "never"] if as_list else stop)
    )
    assert record["text"] == whole[: whole.index(stop)]
    assert record["finish_reason"] == "stop"


def test_the_same_seed_gives_the_same_answer_and_another_another(tiny: Worker) -> None:
    sampled = {"temperature": 1.0, "max_new_tokens": 24}
    first = tiny.last(**body(seed=7) | sampled)["text"]
    assert tiny.last(**body(seed=7) | sampled)["text"] == first
    assert tiny.last(**body(seed=8) | sampled)["text"] != first


def test_holohubs_request_is_understood(tiny: Worker) -> None:
    """NVIDIA HoloHub's `vila_live` sends no model, a list of stops, unknown keys, and no type."""
    request = {
        "prompt": prompt_of("Describe."), "temperature": 0.0, "max_tokens": 4,
        "images": [PICTURE], "stop": ["</s>"], "n_keep": -1, "stream": False,
    }  # fmt: skip
    address = urlsplit(tiny.url)
    connection = http.client.HTTPConnection(address.netloc, timeout=30)
    connection.request("POST", f"{address.path}{STREAM}", json.dumps(request).encode())
    records = records_of(connection.getresponse().read())
    connection.close()
    assert records[-1]["error_code"] == 0
    assert records[-1]["usage"]["completion_tokens"] <= 4


def test_a_first_record_comes_at_once_and_signs_of_life_while_it_waits(
    deploy: Any, tiny_llava: Any
) -> None:
    worker = deploy(
        "slow", model_path=str(tiny_llava), max_num_seqs=1, sign_of_life_s=0.2,
        max_new_tokens_cap=900,
    )  # fmt: skip
    long = body(max_new_tokens=900)
    with worker.stream(**long) as running:
        next(running)
        started = time.monotonic()
        with worker.stream(**long) as waiting:
            first = next(waiting)
            assert time.monotonic() - started < 5  # not after the one that runs
            second = next(waiting)
            assert first["text"] == second["text"] == long["prompt"]
            assert worker.stats()["num_waiting"] == 1
    worker.wait_until_empty()


def test_status_names_the_model_as_tinychat_does(tiny: Worker) -> None:
    assert tiny.status() == {
        "model_names": ["llava-tiny-4bit-AWQ"], "speed": 1, "queue_length": 0,
    }  # fmt: skip


def test_status_counts_what_runs(tiny: Worker) -> None:
    with tiny.stream(**body(max_new_tokens=800)) as records:
        next(records)
        assert tiny.status()["queue_length"] == 1
    tiny.wait_until_empty()
    assert tiny.status()["queue_length"] == 0


def test_sixteen_bits_are_served_under_the_plain_name(deploy: Any, tiny_llava: Any) -> None:
    worker = deploy("sixteen", model_path=str(tiny_llava), precision="W16A16", model_name="llava-x")
    assert worker.status()["model_names"] == ["llava-x"]
    assert worker.last(**body())["error_code"] == 0


def test_a_vila_checkpoint_is_served_in_both_precisions(
    deploy: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.tiny import write_tiny_vila

    folder = write_tiny_vila(tmp_path_factory.mktemp("vila") / "vila1.5-tiny")
    answers = []
    for precision in ("W4A16", "W16A16"):
        worker = deploy(
            f"vila-{precision}", model_path=str(folder), precision=precision, dtype="float32"
        )
        answers.append(worker.ask(Image.new("RGB", (60, 40), "red"), "What?", max_new_tokens=12))
    # The 16-bit linears hold the values of the 4-bit ones.
    assert answers[0] == answers[1] != ""


def test_health_and_the_index_answer(tiny: Worker) -> None:
    import requests

    assert requests.get(f"{tiny.url}/health", timeout=10).json() == {"status": "ok"}
    index = requests.get(f"{tiny.url}/", timeout=10).json()
    assert index["model"] == "llava-tiny-4bit-AWQ"
