"""`messages` of a chat request -> a conversation and the pictures in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments import fields
from models.errors import InvalidRequest
from models.prompts.messages import IMAGE, Message, Part, Role
from models.prompts.tokenizer import IMAGE_PLACEHOLDER

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip
TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
IMAGE_TYPES = ("image_url", "input_image")
WRITTEN_PLACEHOLDER = re.compile(re.escape(IMAGE_PLACEHOLDER))
ESCAPED_PLACEHOLDER = IMAGE_PLACEHOLDER.replace("<", "< ")
"""What a model gets where somebody has typed the placeholder: it reads the same, and is none."""


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        field: where it stands in the request, for messages.
        source: base64, perhaps in a data URL; a web URL; or, from Python, the file.
    """

    field: str
    source: str | bytes


@dataclass(frozen=True)
class Chat:
    """A conversation, and its pictures in the order of their places."""

    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]


def parse_messages(value: object, *, max_images: int, max_chars: int) -> Chat:
    """
    Args:
        max_chars: of all texts together; far more than can fit into the context.

    Raises:
        InvalidRequest: not messages, of a kind that this model does not read, or too much.
    """
    entries = fields.array("messages", value)
    if not entries:
        raise InvalidRequest("messages", "is empty; it must hold at least a user's message")
    pictures: list[Picture] = []
    messages: list[Message] = []
    for index, entry in enumerate(entries):
        messages.append(_message(f"messages[{index}]", entry, pictures))
    if len(pictures) > max_images:
        raise InvalidRequest(
            "messages", f"{len(pictures)} pictures; at most {max_images} are allowed in a request"
        )
    texts = [part for message in messages for part in message.parts if isinstance(part, str)]
    if sum(map(len, texts)) > max_chars:
        raise InvalidRequest("messages", "hold more text than fits into the model's context")
    return Chat(tuple(_with_one_system(messages)), tuple(pictures))


def _message(field: str, entry: object, pictures: list[Picture]) -> Message:
    entry = fields.mapping(field, entry)
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{field}.role", f"{fields.show(role)} is none of {', '.join(ROLES)}")
    content = entry.get("content")
    if content is None and ROLES[role] == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(ROLES[role], _text(f"{field}.content", content))
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(
            f"{field}.content", f"is {fields.kind(content)}; it must be a string or a list of parts"
        )
    parts = [_part(f"{field}.content[{i}]", part, pictures) for i, part in enumerate(content)]
    return Message(ROLES[role], tuple(parts))


def _part(field: str, part: object, pictures: list[Picture]) -> Part:
    if isinstance(part, str):
        return _text(field, part)
    part = fields.mapping(field, part)
    type_ = part.get("type", "text" if "text" in part else "image_url")
    if type_ in TEXT_TYPES:
        key = "refusal" if type_ == "refusal" else "text"
        return _text(f"{field}.{key}", part.get(key))
    if type_ in IMAGE_TYPES:
        pictures.append(_picture(f"{field}.image_url", part.get("image_url")))
        return IMAGE
    raise InvalidRequest(
        f"{field}.type", f"{fields.show(type_)} is not read by this model; use text or image_url"
    )


def _picture(field: str, value: Any) -> Picture:
    """OpenAI's object; the bare string that many servers take; bytes from Python."""
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, (str, bytes)):
        raise InvalidRequest(
            field,
            f"is {fields.kind(value)}; it must be an object whose `url` is a data: URL, such as "
            '{"url": "data:image/png;base64,..."}',
        )
    return Picture(field, url)


def _text(field: str, value: object) -> str:
    return WRITTEN_PLACEHOLDER.sub(ESCAPED_PLACEHOLDER, fields.text(field, value))


def _with_one_system(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the beginning become one. Templates have no place in it for pictures:
    these go before the first question, and so stay in their order."""
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    system, rest = messages[:count], list(messages[count:])
    if not system:
        return rest
    parts = [part for message in system for part in message.parts]
    texts = [part for part in parts if isinstance(part, str)]
    moved = tuple(part for part in parts if not isinstance(part, str))
    if moved and rest and rest[0].role == "user":
        rest[0] = Message("user", (*moved, *rest[0].parts))
    elif moved:
        raise InvalidRequest("messages", "the first, after a system message, must be a user's")
    return [Message("system", "\n".join(texts)), *rest] if texts else rest
