"""Request bodies: bounded in size, time and structure; JSON whatever they claim to be."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from deployments.body import MAX_VALUES, parse_json, read_json
from models.errors import InvalidRequest, RequestAborted
from tests.unit.deployments.harness import NEVER_S, outcome


class Upload:
    """A request whose body comes in the given pieces; None is a client that says no more.

    One that is not complete promises more, and then its client goes away.
    """

    def __init__(
        self,
        parts: Iterable[bytes | None],
        headers: Mapping[str, str] | None = None,
        *,
        complete: bool = True,
    ) -> None:
        self.parts = list(parts)
        self.complete = complete
        self.received = 0
        raw = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        self.request = Request({"type": "http", "method": "POST", "headers": raw}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        if not self.parts:
            return {"type": "http.disconnect"}
        part = self.parts.pop(0)
        if part is None:
            await asyncio.sleep(NEVER_S)
        self.received += 1
        more = bool(self.parts) or not self.complete
        return {"type": "http.request", "body": part, "more_body": more}


async def read(upload: Upload, *, max_bytes: int = 1 << 20, timeout_s: float = NEVER_S) -> Any:
    return await read_json(upload.request, max_bytes=max_bytes, timeout_s=timeout_s)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}],
)
async def test_the_content_type_does_not_matter(headers: dict[str, str]) -> None:
    assert await read(Upload([b'{"prompt": "hi"}'], headers)) == {"prompt": "hi"}


async def test_pieces_are_put_together_wherever_they_were_cut() -> None:
    body = json.dumps({"prompt": "猫 and \U0001f600"}, ensure_ascii=False).encode()
    pieces = [body[i : i + 1] for i in range(len(body))]
    assert await read(Upload(pieces)) == {"prompt": "猫 and \U0001f600"}


async def test_the_largest_body_passes_and_a_byte_more_does_not() -> None:
    body = json.dumps("x" * 98).encode()
    assert await read(Upload([body]), max_bytes=100) == "x" * 98
    with pytest.raises(InvalidRequest, match="body: is larger than 99 bytes"):
        await read(Upload([body]), max_bytes=99)


async def test_an_announced_size_is_refused_before_anything_is_read() -> None:
    for announced in ("101", "9" * 30, "9" * 6000):  # int() refuses the last one
        upload = Upload([b"x" * 10] * 20, {"Content-Length": announced})
        with pytest.raises(InvalidRequest, match="is larger than 100 bytes"):
            await read(upload, max_bytes=100)
        assert upload.received == 0


@pytest.mark.parametrize("announced", ["5", "-1", "many", "", "1e9"])
async def test_a_lie_about_the_size_does_not_help(announced: str) -> None:
    upload = Upload([b"x" * 10] * 1000, {"Content-Length": announced})
    with pytest.raises(InvalidRequest, match="is larger than 100 bytes"):
        await read(upload, max_bytes=100)
    assert upload.received <= 11  # the rest was not even read


async def test_a_body_that_never_ends_is_given_up() -> None:
    with pytest.raises(InvalidRequest, match=r"body: had not arrived after 0\.05 s"):
        await read(Upload([b'{"prompt": ', None]), timeout_s=0.05)


async def test_a_client_that_leaves_is_no_internal_error() -> None:
    with pytest.raises(RequestAborted):
        await read(Upload([b'{"prompt": '], complete=False))


@pytest.mark.parametrize(
    "body",
    [
        b"", b" \r\n ", b"{", b"{]", b"prompt=hi", b"{'prompt': 'hi'}", b"\xff\xfe\xfd", b"\0",
        b'{"a": "\xc3"}', b"9" * 5000, b'{"a": 1}{"b": 2}', b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000 + b"]" * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body)
    assert caught.value.field == "body"
    assert len(str(caught.value)) < 100  # none of it is quoted


def test_the_place_of_the_mistake_is_told() -> None:
    with pytest.raises(InvalidRequest, match="character 6"):
        parse_json(b'{"a": oops}')


def test_millions_of_empty_lists_are_refused_before_they_are_built() -> None:
    for many in (b"[" + b"[]," * MAX_VALUES + b"[]]", b"[" + b"{}," * MAX_VALUES + b"{}]"):
        with pytest.raises(InvalidRequest, match="values"):
            parse_json(many)
    assert len(parse_json(b"[" + b"1," * (MAX_VALUES // 2) + b"1]")) == MAX_VALUES // 2 + 1


def test_numbers_that_are_none_are_left_to_the_fields() -> None:
    """Python's JSON knows them; an unread key with one in it does no harm."""
    value = parse_json(b'{"a": NaN, "b": Infinity}')
    assert math.isnan(value["a"])
    assert value["b"] == math.inf


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    found = outcome(lambda: parse_json(body))
    assert not isinstance(found, InvalidRequest) or found.field == "body"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_json_is_read_as_it_is(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
