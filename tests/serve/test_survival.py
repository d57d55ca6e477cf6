"""A replica, or its engine's process, is killed while it streams."""

from __future__ import annotations

import time

import psutil
import pytest
import requests

from models.demo import DEMO_CHECKPOINT, simple_scene
from tests.serve.conftest import Deploy
from tests.serve.worker import Worker, base64_of, prompt_of, wait_until

RECOVERY_S = 20.0


@pytest.fixture(scope="module")
def mortal(deploy: Deploy) -> Worker:
    return deploy("mortal", model_path=str(DEMO_CHECKPOINT))


def replica_process(app: str) -> psutil.Process:
    title = f"ServeReplica:{app}:ModelWorker"
    (found,) = [
        process for process in psutil.Process().children(recursive=True)
        if title in " ".join(process.cmdline())
    ]  # fmt: skip
    return found


def test_the_stream_ends_the_replica_comes_back_and_answers_truly(mortal: Worker) -> None:
    with mortal.stream(
        prompt=prompt_of("What?"), images=[base64_of(simple_scene("red", "circle"))],
        max_new_tokens=900, ignore_eos=True,
    ) as records:  # fmt: skip
        next(records)
        next(records)
        replica_process("mortal").kill()
        # The process that would have written an error record is gone; what matters is that the
        # client is not left waiting: the connection is cut, which every client notices.
        started = time.monotonic()
        with pytest.raises(requests.RequestException):
            list(records)
        assert time.monotonic() - started < RECOVERY_S

    wait_until_recovered(mortal)


def test_an_engine_that_is_killed_is_said_to_be_dead_and_comes_back(mortal: Worker) -> None:
    with mortal.stream(
        prompt=prompt_of("What?"), images=[base64_of(simple_scene("red", "circle"))],
        max_new_tokens=900, ignore_eos=True,
    ) as records:  # fmt: skip
        next(records)
        next(records)
        (engine,) = [
            process for process in replica_process("mortal").children()
            if "models.engine.child" in process.cmdline()
        ]  # fmt: skip
        engine.kill()
        *_, last = records
    assert (last["error_code"], last["error_type"]) == (1, "engine_dead")
    wait_until_recovered(mortal)


def wait_until_recovered(worker: Worker) -> None:
    def answers() -> bool:
        try:
            answer = worker.ask(simple_scene("blue", "star"), "What is in this image?")
        except (AssertionError, requests.RequestException, ValueError):
            return False
        return answer == "The image shows a blue star."

    wait_until(answers, "the next request is answered", RECOVERY_S)
    worker.wait_until_empty()
