"""The engine's figures as Ray metrics, which Ray's own exporter serves to Prometheus.

Where vLLM has a metric of the same meaning, it has vLLM's name, unit and labels here, so
that dashboards and alerts made for vLLM on Ray (`ray_vllm_*`) work as they are. What vLLM has not
is called `tinychat_*`. Ray adds `ray_` in front and `_total` behind counters.

Nothing is recorded for each token: the engine counts, and once a second what has been added since
is passed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ray.serve import metrics as serve_metrics

from deployments.request_log import RequestEntry
from models.engine.token_gaps import BOUNDS_S

if TYPE_CHECKING:
    from models import Engine
    from models.engine.messages import FinishedRequest

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
"""Between two looks at the engine; Ray itself reports every 10 s unless it is told otherwise."""
RAY_PREFIX = "ray_"
ANSWERED = ("stop", "length")

# vLLM's, and finer ones below, where small models answer. The same for all models: Ray's exporter
# keeps one set of buckets for a name on a node, and drops what is reported with another.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
REQUEST_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0,
    10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5) if m * 10**e <= 100_000)

Record: TypeAlias = Callable[[float, "dict[str, str]"], None]
"""Sets a gauge, adds to a counter (more than 0) or enters a value into a histogram; with labels."""


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        name: as it is registered with Ray.
        labels: besides those that all have: `model_name`, and Serve's `application`, `deployment`
            and `replica`.
        bounds: upper ones of a histogram's buckets.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def scraped_as(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        name = RAY_PREFIX + self.name
        if self.kind == "counter":
            return (f"{name}_total",)
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
        return (name,)


RUNNING = Metric(
    "vllm_num_requests_running", "gauge", "Requests that the engine is computing."
)  # fmt: skip
WAITING = Metric(
    "vllm_num_requests_waiting", "gauge", "Requests that wait in the engine for their turn."
)
KV_USAGE = Metric(
    "vllm_kv_cache_usage_perc", "gauge",
    "Share of the KV cache's blocks that requests hold, from 0 to 1. What is only kept for reuse "
    "counts as free.",
)  # fmt: skip
PROMPT_TOKENS = Metric(
    "vllm_prompt_tokens", "counter",
    "Tokens of prompts, pictures and cached ones included, counted with the first answered token.",
)  # fmt: skip
GENERATION_TOKENS = Metric("vllm_generation_tokens", "counter", "Tokens generated.")
PREFIX_QUERIES = Metric(
    "vllm_prefix_cache_queries", "counter", "Tokens of prompts that the prefix cache was asked for."
)
PREFIX_HITS = Metric(
    "vllm_prefix_cache_hits", "counter", "Tokens of prompts that the prefix cache had."
)
IMAGE_QUERIES = Metric(
    "vllm_mm_cache_queries", "counter",
    "Pictures whose embeddings a prompt needed; none where the prefix cache has them already.",
)  # fmt: skip
IMAGE_HITS = Metric(
    "vllm_mm_cache_hits", "counter", "Pictures whose embeddings were kept from an earlier request."
)
PREEMPTIONS = Metric(
    "vllm_num_preemptions", "counter",
    "Requests that gave their memory back and were computed again later.",
)  # fmt: skip
SUCCESS = Metric(
    "vllm_request_success", "counter",
    "Requests that the engine has ended: stop, length, abort (the client left) or error.",
    ("finished_reason",),
)  # fmt: skip
FIRST_TOKEN = Metric(
    "vllm_time_to_first_token_seconds", "histogram",
    "From a request's arrival, before its pictures are decoded, to its first token.",
    bounds=FIRST_TOKEN_S,
)  # fmt: skip
TOKEN_GAP = Metric(
    "vllm_inter_token_latency_seconds", "histogram",
    "Between two tokens of a request. One entry for each step of the engine, in which all requests "
    "get a token at once; of the one that waited longest.",
    bounds=BOUNDS_S,
)  # fmt: skip
TIME_PER_TOKEN = Metric(
    "vllm_request_time_per_output_token_seconds", "histogram",
    "A request's mean time between two tokens.",
    bounds=BOUNDS_S,
)  # fmt: skip
LATENCY = Metric(
    "vllm_e2e_request_latency_seconds", "histogram",
    "From a request's arrival to its last token.",
    bounds=REQUEST_S,
)  # fmt: skip
QUEUE_TIME = Metric(
    "vllm_request_queue_time_seconds", "histogram",
    "How long requests waited in the engine for their turn.",
    bounds=REQUEST_S,
)  # fmt: skip
PREFILL_TIME = Metric(
    "vllm_request_prefill_time_seconds", "histogram",
    "From a request's turn to its first token.",
    bounds=REQUEST_S,
)  # fmt: skip
DECODE_TIME = Metric(
    "vllm_request_decode_time_seconds", "histogram",
    "From a request's first token to its last one.",
    bounds=REQUEST_S,
)  # fmt: skip
INFERENCE_TIME = Metric(
    "vllm_request_inference_time_seconds", "histogram",
    "From a request's turn to its last token.",
    bounds=REQUEST_S,
)  # fmt: skip
REQUEST_PROMPT = Metric(
    "vllm_request_prompt_tokens", "histogram",
    "Tokens of a request's prompt, pictures included.",
    bounds=TOKENS,
)  # fmt: skip
REQUEST_GENERATION = Metric(
    "vllm_request_generation_tokens", "histogram", "Tokens generated for a request.", bounds=TOKENS
)
ERRORS = Metric(
    "tinychat_request_errors", "counter",
    "Requests answered with an error, over HTTP and handles: invalid_request, overloaded (refused "
    "at the door), timeout, aborted, engine, engine_dead, internal.",
    ("error_type",),
)  # fmt: skip
DISCONNECTS = Metric(
    "tinychat_client_disconnects", "counter",
    "Requests whose client left before the answer's end, in whichever phase.",
)  # fmt: skip
KV_TOKENS = Metric("tinychat_kv_cache_tokens", "gauge", "Tokens that the KV cache has room for.")
MAX_SEQS = Metric("tinychat_max_num_seqs", "gauge", "Most requests that run at a time.")
IMAGE_BYTES = Metric(
    "tinychat_image_cache_bytes", "gauge", "Bytes of picture embeddings that are kept."
)

METRICS = (
    RUNNING, WAITING, KV_USAGE, PROMPT_TOKENS, GENERATION_TOKENS, PREFIX_QUERIES, PREFIX_HITS,
    IMAGE_QUERIES, IMAGE_HITS, PREEMPTIONS, SUCCESS, FIRST_TOKEN, TOKEN_GAP, TIME_PER_TOKEN,
    LATENCY, QUEUE_TIME, PREFILL_TIME, DECODE_TIME, INFERENCE_TIME, REQUEST_PROMPT,
    REQUEST_GENERATION, ERRORS, DISCONNECTS, KV_TOKENS, MAX_SEQS, IMAGE_BYTES,
)  # fmt: skip
COUNTED = {
    PROMPT_TOKENS: "num_prompt_tokens",
    GENERATION_TOKENS: "num_generated_tokens",
    PREFIX_QUERIES: "prefix_query_tokens",
    PREFIX_HITS: "prefix_hit_tokens",
    IMAGE_QUERIES: "image_queries",
    IMAGE_HITS: "image_hits",
    PREEMPTIONS: "num_preemptions",
}
"""Counters that the engine keeps itself, by the names in its `EngineStats`."""


class ModelMetrics:
    """One replica's metrics. They begin at what the engine has counted when this is made."""

    def __init__(self, engine: Engine, make: Callable[[Metric], Record]) -> None:
        self._engine = engine
        self._records = {metric: make(metric) for metric in METRICS}
        self._seen = engine.stats()
        engine.take_finished()
        self.update()

    def update(self) -> None:
        """Passes on what the engine has done since the last call."""
        stats, seen = self._engine.stats(), self._seen
        self._seen = stats
        self._record(RUNNING, stats.num_running)
        self._record(WAITING, stats.num_waiting)
        self._record(KV_USAGE, stats.blocks_used / stats.blocks_total)
        self._record(KV_TOKENS, stats.blocks_total * stats.block_size)
        self._record(MAX_SEQS, stats.max_num_seqs)
        self._record(IMAGE_BYTES, stats.image_cache_bytes)
        for metric, name in COUNTED.items():
            added = getattr(stats, name) - getattr(seen, name)
            if added > 0:
                self._record(metric, added)
        middles = [(a + b) / 2 for a, b in pairwise((0.0, *BOUNDS_S))] + [2 * BOUNDS_S[-1]]
        for middle, now, before in zip(middles, stats.token_gaps, seen.token_gaps, strict=False):
            for _ in range(now - before):
                self._record(TOKEN_GAP, middle)
        for finished in self._engine.take_finished():
            self._record_finished(finished)

    def note(self, entry: RequestEntry) -> None:
        """A request has been answered, or has failed, by whatever way it came."""
        if entry.error_type is not None:
            self._record(ERRORS, 1, error_type=entry.error_type)
        if entry.client_gone:
            self._record(DISCONNECTS, 1)

    def _record(self, metric: Metric, value: float, **labels: str) -> None:
        self._records[metric](value, labels)

    def _record_finished(self, finished: FinishedRequest) -> None:
        self._record(SUCCESS, 1, finished_reason=finished.reason)
        timing, usage = finished.timing, finished.usage
        if timing is None or timing.started is None:
            return
        self._record(QUEUE_TIME, timing.started - timing.queued)
        if timing.first_token is None or timing.last_token is None:
            return
        self._record(FIRST_TOKEN, timing.first_token - timing.arrived)
        if finished.reason not in ANSWERED:
            return  # of what is cut off, the rest says nothing
        decode = timing.last_token - timing.first_token
        self._record(PREFILL_TIME, timing.first_token - timing.started)
        self._record(DECODE_TIME, decode)
        self._record(INFERENCE_TIME, timing.last_token - timing.started)
        self._record(LATENCY, timing.last_token - timing.arrived)
        if usage.completion_tokens > 1:
            self._record(TIME_PER_TOKEN, decode / (usage.completion_tokens - 1))
        self._record(REQUEST_PROMPT, usage.prompt_tokens)
        self._record(REQUEST_GENERATION, usage.completion_tokens)


async def keep_updated(metrics: ModelMetrics, interval_s: float = INTERVAL_S) -> None:
    """Until it is cancelled. Whatever fails is logged once: metrics must not end a replica."""
    has_failed = False
    while True:
        try:
            metrics.update()
        except Exception:
            if not has_failed:
                logger.exception("metrics could not be recorded")
            has_failed = True
        await asyncio.sleep(interval_s)


def ray_record(metric: Metric, model_name: str) -> Record:
    """As Ray Serve's metrics, which add the application's, deployment's and replica's names."""
    keys: Any = ("model_name", *metric.labels)  # which Ray's annotations allow one of
    tags = {"model_name": model_name}
    if metric.kind == "gauge":
        gauge = serve_metrics.Gauge(metric.name, metric.description, keys)
        gauge.set_default_tags(tags)
        return gauge.set
    if metric.kind == "counter":
        counter = serve_metrics.Counter(metric.name, metric.description, keys)
        counter.set_default_tags(tags)
        return counter.inc
    bounds = list(metric.bounds)
    histogram = serve_metrics.Histogram(metric.name, metric.description, bounds, keys)
    histogram.set_default_tags(tags)
    return histogram.observe
