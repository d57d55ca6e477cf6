"""A client that goes away, in any phase, frees its place and its blocks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from models.demo import simple_scene
from tests.serve.conftest import Deploy
from tests.serve.worker import STREAM, Worker, base64_of, prompt_of, wait_until

PICTURE = base64_of(simple_scene("purple", "cross"))
LONG: dict[str, Any] = {
    "prompt": prompt_of("What?"), "images": [PICTURE], "temperature": 0, "max_new_tokens": 900,
    "ignore_eos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def single(deploy: Deploy, tiny_llava: Path) -> Worker:
    """Runs one at a time and computes few tokens a step, so that every phase lasts."""
    return deploy("single", model_path=str(tiny_llava), max_num_seqs=1, max_num_batched_tokens=16)


def connect(worker: Worker, sent: float) -> socket.socket:
    """A raw connection that has sent so large a share of its request."""
    address = urlsplit(worker.url)
    body = json.dumps(LONG).encode()
    head = (
        f"POST {address.path}{STREAM} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    raw = socket.create_connection((address.hostname, address.port), timeout=30)
    raw.sendall(head + body[: int(len(body) * sent)])
    return raw


def test_while_uploading(single: Worker) -> None:
    with connect(single, sent=0.5):
        pass
    single.wait_until_empty()
    assert single.last(**LONG | {"max_new_tokens": 2})["error_code"] == 0


def test_before_the_first_record(single: Worker) -> None:
    for _ in range(5):
        with connect(single, sent=1.0):
            pass
    single.wait_until_empty()


def test_while_waiting(single: Worker) -> None:
    with single.stream(**LONG) as running:
        next(running)
        with single.stream(**LONG) as waiting:
            next(waiting)
            wait_until(lambda: single.stats()["num_waiting"] == 1, "the second waits")
        wait_until(lambda: single.stats()["num_waiting"] == 0, "its place in the line is free")
        assert single.stats()["num_running"] == 1
    single.wait_until_empty()


def test_in_prefill(single: Worker) -> None:
    long_prompt = LONG | {"prompt": LONG["prompt"] + " word" * 150}
    for _ in range(3):
        with single.stream(**long_prompt) as records:
            next(records)  # the prompt alone: at once, before anything is computed
        single.wait_until_empty()


def test_in_decode(single: Worker) -> None:
    with single.stream(**LONG) as records:
        for record in records:
            if len(record["text"]) > len(LONG["prompt"]) + 20:
                break
        assert single.stats()["blocks_used"] > 0
    single.wait_until_empty()


def test_everyone_at_once(single: Worker) -> None:
    connections = [connect(single, sent=1.0) for _ in range(20)]
    wait_until(lambda: single.status()["queue_length"] >= 15, "most are inside")
    for connection in connections:
        connection.close()
    single.wait_until_empty()
    assert single.last(**LONG | {"max_new_tokens": 2})["error_code"] == 0
