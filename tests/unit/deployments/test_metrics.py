"""What each metric means: from the engine's figures to what Ray is given."""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from dataclasses import fields
from typing import Any, cast

import pytest

from deployments import metrics
from deployments.metrics import METRICS, Metric, ModelMetrics, keep_updated
from deployments.request_log import RequestEntry
from models import EngineStats, Usage
from models.engine.messages import FinishedRequest, Timing
from models.engine.token_gaps import BOUNDS_S
from models.errors import EngineOverloaded
from tests.unit.deployments.harness import FakeEngine, until

ANSWER = Timing(arrived=10.0, queued=10.5, started=12.5, first_token=13.0, last_token=17.0)


class Exporter:
    """Stands for Ray: keeps what it is given, and refuses what Ray's metrics refuse."""

    def __init__(self) -> None:
        self.given: list[tuple[Metric, float, dict[str, str]]] = []

    def make(self, metric: Metric) -> metrics.Record:
        def record(value: float, labels: dict[str, str]) -> None:
            assert set(labels) == set(metric.labels)
            assert metric.kind != "counter" or value > 0
            self.given.append((metric, value, labels))

        return record

    def values(self, metric: Metric) -> list[float]:
        return [value for given, value, _ in self.given if given is metric]

    def labels(self, metric: Metric) -> list[dict[str, str]]:
        return [labels for given, _, labels in self.given if given is metric]


class Observed:
    def __init__(self, **counted: Any) -> None:
        self.engine = FakeEngine()
        self.engine.counted = counted
        self.exporter = Exporter()
        self.metrics = ModelMetrics(cast("Any", self.engine), self.exporter.make)
        self.exporter.given.clear()

    def finish(self, reason: Any, timing: Timing | None, usage: Usage | None = None) -> Exporter:
        self.engine.finished.append(FinishedRequest(reason, usage or Usage(100, 5), timing))
        self.metrics.update()
        return self.exporter


def test_gauges_show_what_the_engine_holds() -> None:
    seen = Observed()
    seen.engine.counted = {
        "num_running": 3, "num_waiting": 2, "blocks_total": 40, "blocks_used": 10,
        "blocks_cached": 20, "block_size": 16, "max_num_seqs": 8, "image_cache_bytes": 99,
    }  # fmt: skip
    seen.metrics.update()
    gauges = {m.name: v for m, v, _ in seen.exporter.given if m.kind == "gauge"}
    assert gauges == {
        "vllm_num_requests_running": 3, "vllm_num_requests_waiting": 2,
        "vllm_kv_cache_usage_perc": 0.25, "tinychat_kv_cache_tokens": 640,
        "tinychat_max_num_seqs": 8, "tinychat_image_cache_bytes": 99,
    }  # fmt: skip


def test_counters_get_what_has_been_added_and_begin_after_the_warm_up() -> None:
    seen = Observed(num_prompt_tokens=50, num_generated_tokens=2, prefix_query_tokens=50)
    seen.engine.counted = {
        "num_prompt_tokens": 150, "num_generated_tokens": 2, "prefix_query_tokens": 150,
        "prefix_hit_tokens": 64, "image_queries": 3, "image_hits": 2, "num_preemptions": 1,
    }  # fmt: skip
    seen.metrics.update()
    seen.metrics.update()
    counters = [(m.name, v) for m, v, _ in seen.exporter.given if m.kind == "counter"]
    assert sorted(counters) == [
        ("vllm_mm_cache_hits", 2), ("vllm_mm_cache_queries", 3), ("vllm_num_preemptions", 1),
        ("vllm_prefix_cache_hits", 64), ("vllm_prefix_cache_queries", 100),
        ("vllm_prompt_tokens", 100),
    ]  # fmt: skip


def test_the_engine_has_every_figure_that_is_counted() -> None:
    assert set(metrics.COUNTED.values()) <= {field.name for field in fields(EngineStats)}


def test_an_answered_request_has_all_its_durations() -> None:
    exporter = Observed().finish("stop", ANSWER, Usage(100, 5))
    histograms = {m.name: v for m, v, _ in exporter.given if m.kind == "histogram"}
    assert histograms == {
        "vllm_request_queue_time_seconds": 2.0,
        "vllm_request_prefill_time_seconds": 0.5,
        "vllm_time_to_first_token_seconds": 3.0,
        "vllm_request_decode_time_seconds": 4.0,
        "vllm_request_time_per_output_token_seconds": 1.0,  # 5 tokens have 4 gaps
        "vllm_request_inference_time_seconds": 4.5,
        "vllm_e2e_request_latency_seconds": 7.0,
        "vllm_request_prompt_tokens": 100,
        "vllm_request_generation_tokens": 5,
    }
    assert exporter.labels(metrics.SUCCESS) == [{"finished_reason": "stop"}]


def test_one_token_has_no_time_per_token() -> None:
    assert Observed().finish("length", ANSWER, Usage(9, 1)).values(metrics.TIME_PER_TOKEN) == []


def test_what_was_cut_off_counts_up_to_its_first_token() -> None:
    exporter = Observed().finish("abort", ANSWER)
    histograms = {m for m, *_ in exporter.given if m.kind == "histogram"}
    assert histograms == {metrics.QUEUE_TIME, metrics.FIRST_TOKEN}
    assert exporter.labels(metrics.SUCCESS) == [{"finished_reason": "abort"}]


@pytest.mark.parametrize("timing", [None, Timing(1.0, 1.0)])
def test_what_never_ran_has_no_durations(timing: Timing | None) -> None:
    exporter = Observed().finish("error", timing)
    assert not [m for m, *_ in exporter.given if m.kind == "histogram"]
    assert exporter.labels(metrics.SUCCESS) == [{"finished_reason": "error"}]


def test_gaps_fall_into_the_buckets_that_the_engine_found() -> None:
    seen = Observed(token_gaps=(5,) + (0,) * len(BOUNDS_S))
    counts = (7, 0, 3, *(0,) * (len(BOUNDS_S) - 3), 1)
    seen.engine.counted = {"token_gaps": counts}
    seen.metrics.update()
    buckets = [bisect_left(BOUNDS_S, v) for v in seen.exporter.values(metrics.TOKEN_GAP)]
    assert buckets == [0, 0, 2, 2, 2, len(BOUNDS_S)]
    assert metrics.TOKEN_GAP.bounds == BOUNDS_S


def test_errors_are_counted_by_kind_and_those_who_leave() -> None:
    seen = Observed()
    refused = RequestEntry()
    refused.note_error(EngineOverloaded("full"))
    for entry in (refused, RequestEntry(client_gone=True), RequestEntry(status=200)):
        seen.metrics.note(entry)
    assert seen.exporter.labels(metrics.ERRORS) == [{"error_type": "overloaded"}]
    assert seen.exporter.values(metrics.DISCONNECTS) == [1]


def test_the_list_of_metrics_is_complete_and_each_can_be_had_from_ray() -> None:
    assert {id(m) for m in vars(metrics).values() if isinstance(m, Metric)} == {*map(id, METRICS)}
    assert len({m.name for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"(vllm|tinychat)_[a-z0-9_]+", metric.name)
        assert not metric.name.endswith("_total")  # Ray adds it
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds)) and 0 not in metric.bounds
        metrics.ray_record(metric, "m")(1.0, dict.fromkeys(metric.labels, "x"))


async def test_failing_metrics_are_logged_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Observed()
    calls: list[int] = []
    said: list[str] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("no exporter")

    monkeypatch.setattr(seen.metrics, "update", fail)
    monkeypatch.setattr(metrics.logger, "exception", said.append)
    task = asyncio.create_task(keep_updated(seen.metrics, 0.0))
    await until(lambda: len(calls) >= 3)
    task.cancel()
    assert said == ["metrics could not be recorded"]
