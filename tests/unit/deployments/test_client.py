"""`python -m deployments.client`: what it says when there is no answer, and a real one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deployments.client import main

PICTURE = str(Path(__file__).resolve().parents[3] / "docs" / "shapes.png")


class Worker(BaseHTTPRequestHandler):
    """Answers every question, at the one path that there is."""

    def do_POST(self) -> None:
        if self.path != "/worker_generate_stream":
            self.send_error(404)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        if body["model"] == "unknown":  # as a controller
            self.wfile.write(json.dumps({"text": "**ERROR**", "error_code": 2}).encode() + b"\0")
            return
        if body["model"] == "sees nothing":
            self.wfile.write(b'{"text": "images[0]: is not a picture", "error_code": 1}\0')
            return
        for text in ("", "A star", "A star."):
            record = {"text": body["prompt"] + text, "error_code": 0}
            self.wfile.write(json.dumps(record).encode() + b"\0")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Worker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("form", ["http://{}", "http://{}/", "{}"])
def test_an_address_may_be_written_in_any_way(
    form: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PICTURE, "What?", "--url", form.format(address)]) == 0
    assert capsys.readouterr().out == "A star.\n"


def test_an_address_with_a_path_is_told_from_one_without(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PICTURE, "What?", "--url", f"http://{address}/v1"]) == 1
    assert "without a path" in capsys.readouterr().err


def test_a_controllers_code_is_put_into_words(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PICTURE, "What?", "--url", address, "--model", "unknown"]) == 1
    assert "knows no worker of the model 'unknown'" in capsys.readouterr().err


def test_a_picture_that_is_none_is_named_by_its_file(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PICTURE, "What?", "--url", address, "--model", "sees nothing"]) == 1
    assert capsys.readouterr().err.startswith(f"{PICTURE}: is not a picture")


def test_a_worker_that_is_not_running_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PICTURE, "What?", "--url", "http://127.0.0.1:9"]) == 1
    told = "nothing answers at http://127.0.0.1:9; is the worker running there?\n"
    assert capsys.readouterr().err == told


def test_a_picture_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.png", "What?"]) == 1
    assert capsys.readouterr().err == "nowhere.png: No such file or directory\n"
