"""What Ray's exporter serves to Prometheus after known requests; what the access log says."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import METRICS
from models.demo import DEMO_CHECKPOINT, simple_scene
from tests.serve.conftest import Deploy
from tests.serve.worker import STREAM, Worker, base64_of, prompt_of, wait_until

APP, CROWDED = "metered", "crowded"
MODELS = {APP: "llava-demo-4bit-AWQ", CROWDED: "llava-tiny-4bit-AWQ"}
QUEUE_TIMEOUT_S = 0.5
QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def metered(deploy: Deploy) -> Worker:
    return deploy(
        APP, model_path=str(DEMO_CHECKPOINT), max_num_seqs=1, max_waiting=1,
        queue_timeout_s=QUEUE_TIMEOUT_S,
        dtype="float32",  # or the longest answer would be over before another waited too long
    )  # fmt: skip


def scraped(app: str = APP) -> dict[str, float]:
    """An application's series: "name" or "name{label}" -> value, over all other labels."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    known = {name: metric for metric in METRICS for name in metric.scraped_as}
    values: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(requests.get(address, timeout=10).text):
        for sample in family.samples:
            if sample.name not in known or sample.labels.get("application") != app:
                continue
            if sample.name.endswith("_bucket"):
                continue
            assert sample.labels["model_name"] == MODELS[app]
            assert sample.labels["deployment"] == "ModelWorker" and sample.labels["replica"]
            own = ",".join(sample.labels[label] for label in known[sample.name].labels)
            values[f"{sample.name}{{{own}}}" if own else sample.name] += sample.value
    return values


def lines() -> list[dict[str, Any]]:
    """Of the access log of the application's one replica."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[attr-defined]
    (file,) = logs.glob(f"access_{APP}_ModelWorker_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def line_of(request_id: str) -> dict[str, Any]:
    wait_until(lambda: any(line["request_id"] == request_id for line in lines()), "it is logged")
    (line,) = [line for line in lines() if line["request_id"] == request_id]
    return line


def long(request_id: str = "") -> dict[str, Any]:
    return {
        "json": {"prompt": prompt_of("What?", 0), "max_new_tokens": 1000, "ignore_eos": True},
        "headers": {"x-request-id": request_id}, "stream": True, "timeout": 60,
    }  # fmt: skip


@pytest.fixture(scope="module")
def after(metered: Worker) -> dict[str, float]:
    """The series after: two answers, a call through a handle, one wrong request, one refused at
    the full door, one that waited too long, and two whose clients left."""
    body = {
        "prompt": prompt_of(QUESTION), "temperature": 0,
        "images": [base64_of(simple_scene("red", "circle"))],
    }  # fmt: skip
    for name in ("answer-1", "answer-2"):
        response = metered.post(body, headers={"x-request-id": name})
        assert response.raw.headers.getlist("x-request-id") == [name]
    metered.post({"prompt": "hi", "temperature": "hot"}, headers={"x-request-id": "wrong"})
    stream = metered.handle.options(stream=True).generate
    pieces = list(stream.remote(prompt="Hello", max_new_tokens=3, ignore_eos=True))
    assert pieces[-1]["finish_reason"] == "length"

    url = f"{metered.url}{STREAM}"
    with requests.post(url, **long("left-running")) as running:
        chunks = running.iter_content(1)  # which hangs up when nobody has it any more
        next(chunks)
        with requests.post(url, **long("late")) as late:
            wait_until(lambda: metered.stats()["num_waiting"] == 1, "it waits")
            metered.post({"prompt": "hi"}, headers={"x-request-id": "refused"})
            assert b"waited too long" in late.content
        with requests.post(url, **long("left-waiting")):
            wait_until(lambda: metered.stats()["num_waiting"] == 1, "it waits")
    metered.wait_until_empty()
    wait_until(
        lambda: (
            scraped()["ray_vllm_request_success_total{abort}"] == 2
            and scraped()["ray_tinychat_client_disconnects_total"] == 2
            and scraped()["ray_vllm_num_requests_running"] == 0
        ),
        "everything has been reported",
    )
    return scraped()


def test_requests_by_their_ends(after: dict[str, float]) -> None:
    success = {k: v for k, v in after.items() if k.startswith("ray_vllm_request_success_total")}
    assert success == {
        "ray_vllm_request_success_total{stop}": 2, "ray_vllm_request_success_total{length}": 1,
        "ray_vllm_request_success_total{abort}": 2, "ray_vllm_request_success_total{error}": 1,
    }  # fmt: skip


def test_errors_by_their_kinds(after: dict[str, float]) -> None:
    errors = {k: v for k, v in after.items() if k.startswith("ray_tinychat_request_errors_total")}
    assert errors == {
        "ray_tinychat_request_errors_total{invalid_request}": 1,
        "ray_tinychat_request_errors_total{overloaded}": 1,
        "ray_tinychat_request_errors_total{timeout}": 1,
    }


def test_tokens_and_cache_hits(after: dict[str, float]) -> None:
    first, second = line_of("answer-1"), line_of("answer-2")
    prompts = first["prompt_tokens"] + second["prompt_tokens"]
    # Those that left are counted too, as far as they came.
    assert after["ray_vllm_prompt_tokens_total"] > prompts
    left = line_of("left-running")["generated_tokens"]
    assert after["ray_vllm_generation_tokens_total"] >= (
        first["generated_tokens"] + second["generated_tokens"] + 3 + left
    )
    assert after["ray_vllm_prefix_cache_queries_total"] >= prompts
    assert after["ray_vllm_prefix_cache_hits_total"] >= second["cached_tokens"] > 0
    # The second time the picture is in the prefix, and nobody needs its embedding.
    assert after["ray_vllm_mm_cache_queries_total"] == 1
    assert after["ray_tinychat_image_cache_bytes"] > 0
    assert "ray_vllm_num_preemptions_total" not in after


def test_durations_are_there_for_those_that_came_so_far(after: dict[str, float]) -> None:
    counts = {k: v for k, v in after.items() if k.endswith("_count")}
    answered, started = 3, 4
    assert counts.pop("ray_vllm_inter_token_latency_seconds_count") > 10
    assert counts == {
        "ray_vllm_request_queue_time_seconds_count": started,
        "ray_vllm_time_to_first_token_seconds_count": started,
        **{
            f"ray_vllm_{name}_count": answered
            for name in (
                "request_prefill_time_seconds", "request_decode_time_seconds",
                "request_inference_time_seconds", "e2e_request_latency_seconds",
                "request_time_per_output_token_seconds", "request_prompt_tokens",
                "request_generation_tokens",
            )
        },
    }  # fmt: skip


def test_room(after: dict[str, float], metered: Worker) -> None:
    stats = metered.stats()
    tokens = stats["blocks_total"] * stats["block_size"]
    assert after["ray_tinychat_kv_cache_tokens"] == tokens
    assert after["ray_tinychat_max_num_seqs"] == 1
    assert after["ray_vllm_kv_cache_usage_perc"] == 0


def test_the_access_log_tells_the_same(after: dict[str, float]) -> None:
    told = {
        name: (line["status"], line["finish_reason"], line["error_type"], line["client_gone"])
        for name in ("answer-1", "wrong", "refused", "late", "left-running", "left-waiting")
        for line in [line_of(name)]
    }
    assert told == {
        "answer-1": (200, "stop", None, False),
        "wrong": (200, None, "invalid_request", False),
        "refused": (200, None, "overloaded", False),
        "late": (200, "error", "timeout", False),
        "left-running": (200, "abort", None, True),
        "left-waiting": (200, "abort", None, True),
    }
    answer = line_of("answer-1")
    assert (answer["route"], answer["method"], answer["images"]) == (STREAM, "POST", 1)
    assert 0 <= answer["queue_ms"] <= answer["ttft_ms"] <= answer["total_ms"]


def test_calls_through_handles_have_serves_request_id(after: dict[str, float]) -> None:
    (line,) = [line for line in lines() if line["method"] == "handle"]
    assert (line["route"], line["generated_tokens"]) == ("generate", 3)
    assert len(line["request_id"]) == 36


def test_no_request_goes_unlogged_and_none_twice(after: dict[str, float]) -> None:
    assert len(lines()) == 8
    assert not [line for line in lines() if {"prompts", "answers"} & set(line)]


def test_gauges_show_what_runs_and_what_waits(
    after: dict[str, float], deploy: Deploy, tiny_llava: Path
) -> None:
    """After the others, since it leaves traces: one request of many choices, one at a time."""
    crowded = deploy(
        CROWDED, model_path=str(tiny_llava), max_num_seqs=1, max_waiting=60, queue_timeout_s=600
    )
    body = {"prompt": "Hello", "n": 50, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with requests.post(f"{crowded.url}/v1/completions", json=body, stream=True, timeout=60):

        def shown() -> bool:
            values = scraped(CROWDED)
            return (
                values["ray_vllm_num_requests_running"] == 1
                and 0 < values["ray_vllm_num_requests_waiting"] < 50
                and 0 < values["ray_vllm_kv_cache_usage_perc"] < 1
            )

        wait_until(shown, "the gauges show it")
    crowded.wait_until_empty()
    wait_until(lambda: scraped(CROWDED)["ray_vllm_num_requests_waiting"] == 0, "they end")
