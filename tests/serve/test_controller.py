"""FastChat's own controller and OpenAI server, unmodified, in front of this worker.

Source of both: PyPI's `fschat`. The controller is LLaVA's with a few routes more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from models.demo import DEMO_CHECKPOINT, simple_scene
from tests.serve.conftest import Deploy, Deployer
from tests.serve.worker import Worker, base64_of, free_port, prompt_of, wait_until

pytest.importorskip("fastchat", reason="pip install fschat")

NAME = "llava-demo-4bit-AWQ"
LONG: dict[str, Any] = {
    "prompt": prompt_of("What?"), "images": [base64_of(simple_scene("red", "ring"))],
    "temperature": 0, "max_new_tokens": 900, "ignore_eos": True,
}  # fmt: skip


class Process:
    """A Python module as a server of its own, that can be killed and started again."""

    def __init__(self, folder: Path, module: str, port: int, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *arguments,
        ]  # fmt: skip
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, probe: str, method: str = "POST") -> None:
        self._process = subprocess.Popen(
            self._command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "LOGDIR": str(self._folder)},
        )  # fmt: skip

        def answers() -> bool:
            try:
                return requests.request(method, f"{self.url}{probe}", timeout=5).ok
            except requests.RequestException:
                return False

        wait_until(answers, f"{self._command[2]} is up", 60)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Controller(Process):
    def post(self, route: str, **body: Any) -> Any:
        return requests.post(f"{self.url}/{route}", json=body, timeout=30).json()

    def models(self) -> list[str]:
        return list(self.post("list_models")["models"])


@contextmanager
def running(process: Process, probe: str, method: str = "POST") -> Iterator[None]:
    process.start(probe, method)
    try:
        yield
    finally:
        process.kill()


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    folder = tmp_path_factory.mktemp("controller")
    process = Controller(folder, "fastchat.serve.controller", free_port())
    with running(process, "/list_models"):
        yield process


@pytest.fixture(scope="module")
def registered(deployer: Deployer, deploy: Deploy, controller: Controller) -> Worker:
    """The demo model, registered; two replicas."""
    worker = deploy(
        "registered", model_path=str(DEMO_CHECKPOINT), no_register=False,
        controller_addr=controller.url, worker_addr=f"{deployer.url}/registered",
        heartbeat_interval_s=2,
        options={"num_replicas": 2},
    )  # fmt: skip
    wait_until(lambda: NAME in controller.models(), "the worker is registered")
    return worker


def test_it_is_listed_among_the_multimodal_models(
    registered: Worker, controller: Controller
) -> None:
    assert controller.post("list_multimodal_models")["models"] == [NAME]
    assert controller.post("list_language_models")["models"] == []
    assert controller.post("get_worker_address", model=NAME)["address"] == registered.url


def test_the_controllers_proxy_passes_a_true_answer_on(
    registered: Worker, controller: Controller
) -> None:
    through = Worker(controller.url, registered.handle)
    record = through.last(
        model=NAME, prompt=prompt_of("What is in this image?"), temperature=0,
        images=[base64_of(simple_scene("orange", "square"))],
    )  # fmt: skip
    assert record["text"].endswith("ASSISTANT:The image shows an orange square.")


def test_the_queue_length_is_the_sum_over_replicas(
    registered: Worker, controller: Controller
) -> None:
    clients = 6
    leave = threading.Event()

    def read() -> None:
        while not leave.is_set():
            with registered.stream(**LONG) as records:
                for _ in records:
                    if leave.is_set():
                        break

    with ThreadPoolExecutor(clients) as pool:
        try:
            for _ in range(clients):
                pool.submit(read)
            wait_until(lambda: registered.status()["queue_length"] == clients, "all are counted")
            assert registered.status()["speed"] == 2
            # The controller's own picture of it, by heartbeat or by asking.
            wait_until(
                lambda: controller.post("worker_get_status")["queue_length"] == clients,
                "the controller knows",
            )
        finally:
            leave.set()
    wait_until(lambda: registered.status()["queue_length"] == 0, "all are gone")


def test_it_is_kept_through_a_refresh_while_clients_wait(
    registered: Worker, controller: Controller
) -> None:
    leave = threading.Event()

    def read() -> None:
        with registered.stream(**LONG) as records:
            for _ in records:
                if leave.is_set():
                    break

    with ThreadPoolExecutor(20) as pool:
        for _ in range(20):
            pool.submit(read)
        wait_until(lambda: registered.status()["queue_length"] >= 15, "most are inside")
        controller.post("refresh_all_workers")
        assert controller.models() == [NAME]
        leave.set()
    wait_until(lambda: registered.status()["queue_length"] == 0, "all are gone")


def test_a_controller_that_was_killed_gets_the_worker_back(
    registered: Worker, controller: Controller
) -> None:
    controller.kill()
    answer = registered.ask(simple_scene("red", "circle"), "What is in this image?")
    assert answer == "The image shows a red circle."  # whatever becomes of the controller
    controller.start("/list_models")
    wait_until(lambda: NAME in controller.models(), "the worker is back", 30)


@pytest.fixture(scope="module")
def openai_url(
    registered: Worker, controller: Controller, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    server = Process(
        tmp_path_factory.mktemp("openai"), "fastchat.serve.openai_api_server", free_port(),
        "--controller-address", controller.url,
    )  # fmt: skip
    with running(server, "/v1/models", "GET"):
        yield server.url


def test_fastchats_openai_server_answers_a_picture_question(openai_url: str) -> None:
    """Unstreamed: the PyPI release's own streaming fails under pydantic 2, whatever the worker."""
    picture = f"data:image/png;base64,{base64_of(simple_scene('blue', 'star'))}"
    response = requests.post(
        f"{openai_url}/v1/chat/completions", timeout=60,
        json={
            "model": NAME, "temperature": 0,
            "messages": [{"role": "user", "content": [
                {"type": "text", "text": "What is in this image?"},
                {"type": "image_url", "image_url": {"url": picture}},
            ]}],
        },
    )  # fmt: skip
    assert response.ok, response.text
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == "The image shows a blue star."
    assert choice["finish_reason"] == "stop"


def test_fastchats_routes_tell_about_the_model(registered: Worker) -> None:
    def post(route: str, **body: Any) -> Any:
        return requests.post(f"{registered.url}/{route}", json=body, timeout=30).json()

    assert post("model_details")["context_length"] >= 512
    counted = post("count_token", prompt="USER: <image>\nHi ASSISTANT:")
    assert counted["error_code"] == 0
    assert counted["count"] > 36  # the picture alone
    assert post("worker_get_conv_template")["conv"]["name"] == "vicuna_v1"
    whole = post(
        "worker_generate", prompt=prompt_of("What colour is the circle?"), echo=False,
        images=[base64_of(simple_scene("green", "circle"))], temperature=0,
    )  # fmt: skip
    assert whole["text"] == "It is green."
    assert whole["finish_reason"] == "stop"
    assert post("count_token")["error_code"] == 1
    assert post("worker_generate", prompt=5)["error_code"] == 1
