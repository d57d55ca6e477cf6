"""A deployed worker as its clients see it, and the pictures and requests that tests send."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
from PIL import Image
from ray.serve.handle import DeploymentHandle

STREAM = "/worker_generate_stream"
TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def base64_of(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def prompt_of(question: str, pictures: int = 1) -> str:
    return f"USER: {'<image>' * pictures}\n{question} ASSISTANT:"


def wait_until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def records_of(body: bytes) -> list[dict[str, Any]]:
    """Null-terminated JSON; what is left after the last zero byte must be nothing."""
    *records, rest = body.split(b"\0")
    assert rest == b""
    return [json.loads(record) for record in records]


@dataclass(frozen=True)
class Worker:
    """One deployed application."""

    url: str
    handle: DeploymentHandle

    def post(self, body: Any, **options: Any) -> requests.Response:
        if not isinstance(body, (bytes, Iterator)):
            body = json.dumps(body)
        return requests.post(f"{self.url}{STREAM}", data=body, timeout=TIMEOUT_S, **options)

    def records(self, body: Any) -> list[dict[str, Any]]:
        """All records of one answer."""
        response = self.post(body)
        assert response.status_code == requests.codes.ok
        return records_of(response.content)

    def last(self, **body: Any) -> dict[str, Any]:
        return self.records(body)[-1]

    def ask(self, image: Image.Image, question: str, **more: Any) -> str:
        """The answer's text, without the prompt."""
        prompt = prompt_of(question)
        record = self.last(
            prompt=prompt,
            images=[base64_of(image)],
            **{"temperature": 0, "max_new_tokens": 64} | more,
        )
        assert record["error_code"] == 0, record
        assert record["text"].startswith(prompt)
        return str(record["text"][len(prompt) :])

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """A running answer's records as they come; leaving the block hangs up."""
        with requests.post(
            f"{self.url}{STREAM}", json=body, stream=True, timeout=TIMEOUT_S
        ) as response:
            chunks = response.iter_lines(chunk_size=1, decode_unicode=False, delimiter=b"\0")
            yield (json.loads(chunk) for chunk in chunks if chunk)

    def status(self) -> dict[str, Any]:
        response = requests.post(f"{self.url}/worker_get_status", timeout=TIMEOUT_S)
        assert response.status_code == requests.codes.ok
        status: dict[str, Any] = response.json()
        return status

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.handle.get_stats.remote().result(timeout_s=TIMEOUT_S)
        return stats

    def is_empty(self) -> bool:
        """Nothing runs or waits, every place is free, and every KV block has come back."""
        stats = self.stats()
        accounted = stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_used"]
        return (
            stats["num_running"] == stats["num_waiting"] == stats["queue_length"] == 0
            and stats["blocks_used"] == 0
            and accounted == stats["blocks_total"]
            and not stats["dead"]
        )

    def wait_until_empty(self) -> None:
        wait_until(self.is_empty, "the worker is empty again")
