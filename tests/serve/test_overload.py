"""The door, the engine's line, and what still answers when both are full."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from models.demo import simple_scene
from tests.serve.conftest import Deploy, Deployer
from tests.serve.worker import Worker, base64_of, prompt_of, wait_until

RUNNING, WAITING = 4, 20
REQUEST: dict[str, Any] = {
    "prompt": prompt_of("What?"), "images": [base64_of(simple_scene("red", "ring"))],
    "temperature": 0, "max_new_tokens": 900, "ignore_eos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(deploy: Deploy, tiny_llava: Path) -> Worker:
    return deploy(
        "small", model_path=str(tiny_llava), max_num_seqs=RUNNING, max_waiting=WAITING,
        kv_cache_bytes=64 << 20,
    )  # fmt: skip


class Crowd:
    """So many clients at once, each reading its stream until told to leave."""

    def __init__(self, worker: Worker, size: int) -> None:
        self._worker = worker
        self._leave = threading.Event()
        self._pool = ThreadPoolExecutor(size)
        self._clients = [self._pool.submit(self._read) for _ in range(size)]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._pool.shutdown(wait=True)

    def records(self) -> list[dict[str, Any]]:
        """The last record of each."""
        return [client.result() for client in self._clients]

    def _read(self) -> dict[str, Any]:
        record: dict[str, Any] = {}
        with self._worker.stream(**REQUEST) as records:
            for latest in records:
                record = latest
                if self._leave.is_set():
                    break
        return record


def test_a_full_worker_still_answers_status_and_health(small: Worker) -> None:
    latencies = []
    with Crowd(small, RUNNING + WAITING):
        wait_until(lambda: small.status()["queue_length"] == RUNNING + WAITING, "all are inside")
        assert small.stats()["num_running"] == RUNNING
        for path in ["worker_get_status", "health"] * 15:
            started = time.perf_counter()
            method = requests.get if path == "health" else requests.post
            response = method(f"{small.url}/{path}", timeout=10)
            latencies.append(time.perf_counter() - started)
            assert response.status_code == 200
    small.wait_until_empty()
    assert statistics.median(latencies) < 0.2
    assert max(latencies) < 2


def test_one_more_than_fits_is_refused_at_once_and_the_others_are_not(small: Worker) -> None:
    with Crowd(small, RUNNING + WAITING):
        wait_until(lambda: small.status()["queue_length"] == RUNNING + WAITING, "all are inside")
        (record,) = small.records(REQUEST)
        assert record["error_code"] == 1
        assert record["error_type"] == "overloaded"
        assert "full" in record["text"]
        assert small.status()["queue_length"] == RUNNING + WAITING
    small.wait_until_empty()


def test_all_that_wait_are_answered_in_the_end(small: Worker) -> None:
    request = REQUEST | {"max_new_tokens": 60}
    expected = small.last(**request)
    with ThreadPoolExecutor(RUNNING + WAITING) as pool:
        clients = [pool.submit(small.last, **request) for _ in range(RUNNING + WAITING)]
        answers = [client.result() for client in clients]
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    assert all(answer["text"].startswith(expected["text"][:60]) for answer in answers)
    small.wait_until_empty()


def test_who_waits_too_long_is_told_so(deploy: Deploy, tiny_llava: Path) -> None:
    worker = deploy("hasty", model_path=str(tiny_llava), max_num_seqs=1, queue_timeout_s=0.3)
    with worker.stream(**REQUEST) as running:
        next(running)
        record = worker.records(REQUEST)[-1]
        assert record["error_code"] == 1
        assert record["error_type"] == "timeout"
    worker.wait_until_empty()


def test_serves_own_limit_shrinks_the_line_and_then_the_batch(
    deploy: Deploy, tiny_llava: Path
) -> None:
    worker = deploy(
        "narrow", model_path=str(tiny_llava), max_num_seqs=4, max_waiting=20,
        options={"max_ongoing_requests": 12},
    )  # fmt: skip
    stats = worker.stats()
    assert stats["max_num_seqs"] == 4
    assert stats["queue_limit"] < 12
    with Crowd(worker, stats["queue_limit"]):
        wait_until(
            lambda: worker.status()["queue_length"] == stats["queue_limit"], "all are inside"
        )
        assert worker.records(REQUEST)[-1]["error_type"] == "overloaded"
        assert requests.get(f"{worker.url}/health", timeout=5).status_code == 200
    worker.wait_until_empty()


def test_a_limit_too_small_to_work_is_refused_with_a_message(
    deployer: Deployer, tiny_llava: Path
) -> None:
    message = deployer.failure(
        "nothing", model_path=str(tiny_llava), options={"max_ongoing_requests": 2}
    )
    assert "max_ongoing_requests is 2" in message
