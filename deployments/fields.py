"""Fields of a request's JSON, checked by hand: messages name the field and say what is right."""

from __future__ import annotations

import math
from typing import Any

from models.errors import InvalidRequest

SHOWN_CHARS = 60


def number(field: str, value: object) -> float:
    """
    Raises:
        InvalidRequest: no number, or not a finite one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, f"is {kind(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(field, f"{show(value)} is not a finite number")
    return number


def integer(field: str, value: object) -> int:
    """An integer of at most 64 bits; JavaScript's 64.0 is one too.

    Raises:
        InvalidRequest: none.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, f"{show(value)} is not an integer")
    if not -(1 << 63) <= value < 1 << 63:
        raise InvalidRequest(field, f"{show(value)} is out of range")
    return value


def boolean(field: str, value: object) -> bool:
    """
    Raises:
        InvalidRequest: neither true nor false.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(field, f"is {kind(value)}; it must be true or false")
    return value


def text(field: str, value: object) -> str:
    """
    Raises:
        InvalidRequest: no string, or one that cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise InvalidRequest(field, f"is {kind(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(field, "has half of a surrogate pair in it") from None
    return value


def mapping(field: str, value: object) -> dict[str, Any]:
    """
    Raises:
        InvalidRequest: no JSON object.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(field, f"is {kind(value)}; it must be an object")
    return value


def array(field: str, value: object) -> list[Any]:
    """
    Raises:
        InvalidRequest: no list.
    """
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(field, f"is {kind(value)}; it must be a list")
    return list(value)


def kind(value: object) -> str:
    """What it is, in a word."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a string", bool: "true or false",
        int: "a number", float: "a number",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def show(value: object) -> str:
    """The value for a message, shortened. Writing out 10**5000 or lists in lists would raise."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of many digits"
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN_CHARS else repr(value[:SHOWN_CHARS]) + "..."
    return repr(value) if isinstance(value, (int, float)) else kind(value)
