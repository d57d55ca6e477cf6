"""Records: what is on the wire, and what is kept off it."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.error_types import ERROR_TYPES
from deployments.records import error_record, frame, text_record
from models import Usage
from models.errors import (
    CheckpointError,
    ConfigurationError,
    EngineDead,
    EngineFault,
    EngineOverloaded,
    InvalidRequest,
    RequestAborted,
    RequestTimeout,
    TinyChatError,
)

ANY_TEXT = st.text(st.characters(codec=None))


def test_a_text_record_has_what_all_three_protocols_read() -> None:
    record = text_record("USER: hi A", Usage(prompt_tokens=3, completion_tokens=1), "length")
    assert record == {
        "text": "USER: hi A",
        "error_code": 0,
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        "finish_reason": "length",
    }
    assert text_record("", Usage())["finish_reason"] is None


@given(ANY_TEXT)
def test_a_frame_has_one_zero_byte_and_it_is_the_last(text: str) -> None:
    framed = frame(text_record(text, Usage()))
    assert framed.index(b"\0") == len(framed) - 1
    assert json.loads(framed[:-1])["text"] == text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("top_p", "is odd"), "invalid_request"),
        (EngineOverloaded("full"), "overloaded"),
        (RequestTimeout("too long"), "timeout"),
        (RequestAborted("gone"), "aborted"),
        (EngineFault("out of memory"), "engine"),
        (EngineDead("closed"), "engine_dead"),
    ],
)
def test_an_error_on_purpose_is_described(error: TinyChatError, kind: str) -> None:
    record = error_record(error)
    assert record["text"] == str(error)
    assert (record["error_code"], record["error_type"]) == (1, kind)


def test_every_error_that_a_request_can_meet_has_a_type() -> None:
    others = {CheckpointError, ConfigurationError}  # those of start-up
    assert set(ERROR_TYPES) == set(TinyChatError.__subclasses__()) - others


def test_an_invalid_request_names_its_field() -> None:
    assert error_record(InvalidRequest("images[2]", "is empty"))["error_field"] == "images[2]"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error at 0x7f3a /root/models/secret.pt: another user's words"),
        FileNotFoundError(2, "No such file", "/etc/secret"),
        KeyError("/etc/secret"),
        ConfigurationError("/etc/secret"),
        CheckpointError("/etc/secret"),
        MemoryError(),
    ],
)
def test_an_unexpected_error_tells_the_client_nothing_and_the_log_all(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        record = error_record(error)
    assert (record["error_code"], record["error_type"]) == (1, "internal")
    assert "error_field" not in record
    for leak in ("0x", "/", "secret", "words", type(error).__name__):
        assert leak not in record["text"]
    (entry,) = caplog.records
    reference = str(entry.args[0]) if isinstance(entry.args, tuple) else ""
    assert len(reference) == 12
    assert reference in record["text"]  # which is how the two are brought together
    assert entry.exc_info is not None
    assert entry.exc_info[1] is error


def test_an_error_on_purpose_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="ray.serve"):
        error_record(InvalidRequest("prompt", "is missing"))
    assert caplog.records == []
