"""A model in a process of its own, at the end of a pipe.

The process that asks and takes the times is another one than the model's, as it is over HTTP, and
does the same: one write for all questions, and one read for the tokens of one step. So both arms
share the machine with a client, and the client's cost is in neither arm alone.

    to the model's process     one JSON line for each round of questions
    from it                    "ready", then lines "<number of the question> <new tokens>"
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.arm import Arm
from benchmarks.load import Answer, Question

LINE_LIMIT = 1 << 26
READY = b"ready"


class PipedArm(Arm):
    def __init__(self, name: str, module: str, *arguments: str) -> None:
        """
        Args:
            module: started by `python -m`; calls `serve`.
        """
        self.name = name
        self._command = (sys.executable, "-m", module, *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        if (await self._line()).strip() != READY:
            raise RuntimeError(f"{self.name} did not start")

    async def ask(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        assert self._process is not None and self._process.stdin is not None
        encoded = [[q.prompt, base64.b64encode(q.picture).decode("ascii")] for q in questions]
        line = json.dumps({"num_tokens": num_tokens, "questions": encoded}).encode() + b"\n"
        answers = [Answer(time.monotonic()) for _ in questions]
        self._process.stdin.write(line)
        missing = num_tokens * len(questions)
        while missing > 0:
            number, new_tokens = map(int, (await self._line()).split())
            answers[number].arrived(time.monotonic(), new_tokens)
            missing -= new_tokens
        return answers

    async def _line(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has died")
        return line

    async def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()


class Outbox:
    """The model's side: new tokens, gathered until they are flushed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: list[str] = []

    def add(self, number: int, new_tokens: int) -> None:
        self._lines.append(f"{number} {new_tokens}\n")

    def flush(self) -> None:
        os.write(self._descriptor, "".join(self._lines).encode())
        self._lines.clear()

    @property
    def is_empty(self) -> bool:
        return not self._lines


class Model(Protocol):
    def answer(self, questions: Sequence[Question], num_tokens: int, outbox: Outbox) -> None:
        """Puts every new token into `outbox`; returns when all questions are answered."""


def serve(load: Callable[[], Model]) -> None:
    """The main loop of the model's process, until its standard input ends."""
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes elsewhere
    model, outbox = load(), Outbox(descriptor)
    os.write(descriptor, READY + b"\n")
    for line in io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)):
        message = json.loads(line)
        questions = [Question(p, base64.b64decode(data)) for p, data in message["questions"]]
        model.answer(questions, message["num_tokens"], outbox)
