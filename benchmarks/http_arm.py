"""A worker, over HTTP: the worker protocol's streams, by a client that costs next to nothing.

It writes down what bytes come when, and makes records of them after the round.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from benchmarks.arm import Arm
from benchmarks.load import Answer, Question
from benchmarks.worker import Worker

HEAD = (
    "POST /worker_generate_stream HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
)


class HttpArm(Arm):
    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name
        self.worker = worker

    async def start(self) -> None:
        await self.worker.start()

    async def ask(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        payloads = [_payload(question, num_tokens) for question in questions]
        return await asyncio.gather(*(self._ask(payload, num_tokens) for payload in payloads))

    async def close(self) -> None:
        await self.worker.stop()

    async def _ask(self, payload: bytes, num_tokens: int) -> Answer:
        loop = asyncio.get_running_loop()
        recording = Recording(payload, loop.create_future())
        answer = Answer(time.monotonic())
        await loop.create_connection(lambda: recording, "127.0.0.1", self.worker.port)
        await recording.ended
        for moment, text in recording.records():
            record = json.loads(text)
            if record["error_code"] != 0:
                raise RuntimeError(f"{self.name}: {record['text']}")
            new_tokens = record["usage"]["completion_tokens"] - answer.num_tokens
            if new_tokens > 0:
                answer.arrived(moment, new_tokens)
        if answer.num_tokens != num_tokens:
            raise RuntimeError(f"{self.name}: {answer.num_tokens} tokens, not {num_tokens}")
        return answer


def _payload(question: Question, num_tokens: int) -> bytes:
    body = json.dumps({
        "prompt": question.prompt, "images": [base64.b64encode(question.picture).decode("ascii")],
        "temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True,
    }).encode()  # fmt: skip
    return HEAD.format(length=len(body)).encode() + body


class Recording(asyncio.Protocol):
    """One request, and the bytes of its answer with their times."""

    def __init__(self, payload: bytes, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self._payload = payload
        self._times: list[float] = []
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self._times.append(time.monotonic())
        self._parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def records(self) -> Iterator[tuple[float, bytes]]:
        """(time at which it was complete, JSON) of each record."""
        ends = list(accumulate(map(len, self._parts)))
        record = b""
        for end, chunk in _chunks(b"".join(self._parts)):
            *complete, rest = (record + chunk).split(b"\0")
            for text in complete:
                yield self._times[bisect_left(ends, end)], text
            record = rest


def _chunks(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it ends, data) of each chunk of a chunked HTTP/1.1 answer."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    if b"200" not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
        raise RuntimeError(f"not a chunked answer: {head[:200]!r}")
    at = len(head) + 4
    while at < len(answer):
        line_end = answer.index(b"\r\n", at)
        size = int(answer[at:line_end], 16)
        start = line_end + 2
        yield start + size, answer[start : start + size]
        at = start + size + 2
