"""A conversation as clients of chat endpoints send it: roles, texts and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from models.errors import InvalidRequest

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImagePart:
    """The place of one picture. The pictures themselves travel beside the conversation, in the
    order of their places."""


Part: TypeAlias = str | ImagePart
IMAGE = ImagePart()


@dataclass(frozen=True)
class Message:
    """
    Attributes:
        content: a text, or texts and pictures in their order. A text may hold `<image>` itself.
    """

    role: Role
    content: str | Sequence[Part]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)


@dataclass(frozen=True)
class Conversation:
    """Messages in the order that every template can write.

    Attributes:
        system: None where the client sent none, so that the template's own counts.
        turns: the user's and the assistant's parts by turns; the user's first.
    """

    system: str | None
    turns: tuple[tuple[Part, ...], ...]

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Conversation:
        """Neighbours of the same role become one message, neighbouring texts one text (on lines
        of their own), and space around a message goes, as VILA does before writing a prompt.

        Raises:
            InvalidRequest: an unknown role, a system message with a picture or not at the
                beginning, or no question.
        """
        system: str | None = None
        roles: list[Role] = []
        turns: list[tuple[Part, ...]] = []
        for number, message in enumerate(messages):
            if message.role not in get_args(Role):
                raise InvalidRequest(
                    "messages",
                    f"the role of number {number + 1} is {message.role!r:.80}; it must be one of "
                    f"{', '.join(get_args(Role))}",
                )
            if message.role == "system":
                if number > 0:
                    raise InvalidRequest("messages", "a system message must be the first")
                system = _system_text(message)
            elif roles and roles[-1] == message.role:
                turns[-1] = (*turns[-1], *message.parts)
            else:
                roles.append(message.role)
                turns.append(message.parts)
        if not roles or roles[0] != "user":
            raise InvalidRequest("messages", "the first, after a system message, must be a user's")
        return cls(system, tuple(_tidy(parts) for parts in turns))

    @property
    def is_answered(self) -> bool:
        """Whether the assistant had the last word."""
        return len(self.turns) % 2 == 0

    def require_question(self) -> None:
        """
        Raises:
            InvalidRequest: there is nothing to be answered.
        """
        if self.is_answered:
            raise InvalidRequest("messages", "the last must be a user's, which is to be answered")


def joined(parts: Iterable[Part], placeholder: str, separator: str) -> str:
    """One text of all parts, in which pictures are placeholders."""
    return separator.join(part if isinstance(part, str) else placeholder for part in parts)


def _system_text(message: Message) -> str:
    texts = [part for part in message.parts if isinstance(part, str)]
    if len(texts) != len(message.parts):
        raise InvalidRequest("messages", "a system message cannot hold pictures")
    return "\n".join(texts)


def _tidy(parts: Sequence[Part]) -> tuple[Part, ...]:
    tidy: list[Part] = []
    for part in parts:
        if isinstance(part, str) and tidy and isinstance(tidy[-1], str):
            tidy[-1] = f"{tidy[-1]}\n{part}"
        else:
            tidy.append(part)
    if tidy and isinstance(tidy[0], str):
        tidy[0] = tidy[0].lstrip()
    if tidy and isinstance(tidy[-1], str):
        tidy[-1] = tidy[-1].rstrip()
    return tuple(part for part in tidy if part != "")
