"""Messages as clients send them: texts, pictures, roles, and what is none of these."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.openai.messages import Chat, parse_messages
from models.errors import InvalidRequest
from models.prompts import IMAGE, Message

URL = "data:image/png;base64,AAAA"


def parse(*messages: Any, max_images: int = 4, max_chars: int = 1000) -> Chat:
    return parse_messages(list(messages), max_images=max_images, max_chars=max_chars)


def image(url: Any = URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_a_string_is_a_text() -> None:
    chat = parse({"role": "user", "content": "hi"})
    assert chat == Chat((Message("user", "hi"),), ())


def test_parts_keep_their_order_and_pictures_that_of_their_places() -> None:
    chat = parse(
        user(text("a"), image("one"), text("b"), image("two")),
        {"role": "assistant", "content": "c"},
        user(image("three"), text("d")),
    )
    assert [m.parts for m in chat.messages] == [("a", IMAGE, "b", IMAGE), ("c",), (IMAGE, "d")]
    assert [(p.field, p.source) for p in chat.pictures] == [
        ("messages[0].content[1].image_url", "one"),
        ("messages[0].content[3].image_url", "two"),
        ("messages[2].content[0].image_url", "three"),
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}, "uuid": "1"},
        {"type": "image_url", "image_url": URL},
        {"type": "input_image", "image_url": URL},
        {"image_url": {"url": URL}},
    ],
)
def test_a_picture_has_several_spellings(part: dict[str, Any]) -> None:
    assert [p.source for p in parse(user(part)).pictures] == [URL]


@pytest.mark.parametrize(
    "part",
    ["hi", text("hi"), {"type": "input_text", "text": "hi"}, {"text": "hi"},
     {"type": "refusal", "refusal": "hi"}],
)  # fmt: skip
def test_so_has_a_text(part: Any) -> None:
    assert parse(user(part)).messages[0].parts == ("hi",)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_typed_placeholder_is_no_place_for_a_picture(role: str) -> None:
    chat = parse({"role": role, "content": "what is <image> and <image>?"}, user(image()))
    (written,) = chat.messages[0].parts
    assert written == "what is < image> and < image>?"
    assert len(chat.pictures) == 1


class TestSystem:
    def test_several_at_the_beginning_are_one(self) -> None:
        chat = parse(
            {"role": "system", "content": "a"}, {"role": "developer", "content": [text("b")]},
            {"role": "user", "content": "c"},
        )  # fmt: skip
        assert chat.messages == (Message("system", "a\nb"), Message("user", "c"))

    def test_its_pictures_come_before_the_first_question(self) -> None:
        chat = parse(
            {"role": "system", "content": [text("a"), image("one")]}, user(text("b"), image("two"))
        )
        assert [m.parts for m in chat.messages] == [("a",), (IMAGE, "b", IMAGE)]
        assert [p.source for p in chat.pictures] == ["one", "two"]


def test_an_assistants_null_is_nothing() -> None:
    """Of a message that called tools."""
    chat = parse(user("a"), {"role": "assistant", "content": None}, user("b"))
    assert chat.messages[1].parts == ("",)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"), ([], "messages"), ("hi", "messages"), ([1], "messages[0]"),
        ([{}], "messages[0].role"), ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([user(text(None))], "messages[0].content[0].text"),
        ([user("a", text("\ud83d"))], "messages[0].content[1].text"),
        ([user({"type": "video_url", "video_url": {}})], "messages[0].content[0].type"),
        ([user({"type": {}})], "messages[0].content[0].type"),
        ([user({"type": "image_url"})], "messages[0].content[0].image_url"),
        ([user({"type": "image_url", "image_url": {}})], "messages[0].content[0].image_url"),
        ([user(image(["a"]))], "messages[0].content[0].image_url"),
        ([user(*[image()] * 5)], "messages"),
        ([user("a" * 1001)], "messages"),
        ([{"role": "system", "content": [image()]}], "messages"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(messages, max_images=4, max_chars=1000)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300
