"""The body of a `/worker_generate_stream` request, checked and completed.

Keys that are not read here (`model`, `stream`, `n_keep`, ...) are ignored, and null means absent:
the protocol's clients send more than its workers ever understood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config import ANY_MAX_NEW_TOKENS
from models import SamplingParams
from models.errors import InvalidRequest

IMAGE_PLACEHOLDER = "<image>"
FASTCHAT_PLACEHOLDER = "$$<image>$$"
"""What FastChat's OpenAI server of 2024 puts before the text, for a worker to replace."""
SHOWN_CHARS = 60


@dataclass(frozen=True)
class RequestLimits:
    """
    Attributes:
        max_prompt_chars: far more than can ever fit into the context; keeps the tokeniser from
            working on megabytes only to refuse them.
    """

    default_max_new_tokens: int
    max_new_tokens_cap: int
    max_images: int
    max_prompt_chars: int


@dataclass(frozen=True)
class WorkerRequest:
    """
    Attributes:
        prompt: as it came, which is how it is echoed.
        images: as sent: base64, perhaps in data URLs.
        echo: whether `text` begins with the prompt.
    """

    prompt: str
    images: tuple[str, ...]
    params: SamplingParams
    echo: bool = True

    @property
    def model_prompt(self) -> str:
        """The prompt as the model gets it."""
        return self.prompt.replace(FASTCHAT_PLACEHOLDER, f"{IMAGE_PLACEHOLDER}\n")

    @classmethod
    def parse(cls, body: object, limits: RequestLimits) -> WorkerRequest:
        """
        Raises:
            InvalidRequest: a field is missing or wrong.
        """
        if not isinstance(body, Mapping):
            raise InvalidRequest("body", f"is {_kind(body)}; it must be a JSON object")
        prompt = _prompt(body, limits)
        images = _images(body, limits)
        placeholders = prompt.count(IMAGE_PLACEHOLDER)
        if len(images) != placeholders:
            raise InvalidRequest(
                "images",
                f"{len(images)} in `images`, but {placeholders} {IMAGE_PLACEHOLDER} in the "
                "prompt; there must be one for each",
            )
        return cls(prompt, images, _sampling_params(body, limits), body.get("echo") is not False)


def _prompt(body: Mapping[str, Any], limits: RequestLimits) -> str:
    prompt = body.get("prompt")
    if prompt is None:
        raise InvalidRequest("prompt", "is missing; it must be the text to answer")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt", f"is {_kind(prompt)}; it must be a string")
    if len(prompt) > limits.max_prompt_chars:
        raise InvalidRequest(
            "prompt", f"has {len(prompt)} characters, more than fit into the model's context"
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", "has half of a surrogate pair in it") from None
    return prompt


def _images(body: Mapping[str, Any], limits: RequestLimits) -> tuple[str, ...]:
    images = body.get("images")
    if images is None:
        return ()
    if not isinstance(images, list):
        raise InvalidRequest("images", f"is {_kind(images)}; it must be a list of base64 strings")
    if len(images) > limits.max_images:
        raise InvalidRequest("images", f"{len(images)} pictures; at most {limits.max_images}")
    for index, image in enumerate(images):
        if not isinstance(image, str):
            raise InvalidRequest(
                f"images[{index}]", f"is {_kind(image)}; it must be a base64 string"
            )
    return tuple(images)


def _sampling_params(body: Mapping[str, Any], limits: RequestLimits) -> SamplingParams:
    given: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if body.get(name) is not None:
            given[name] = _number(name, body[name])
    for name in ("top_k", "seed"):
        if body.get(name) is not None:
            given[name] = _integer(name, body[name])
    stop = body.get("stop")
    if stop is not None:
        given["stop"] = tuple(stop) if isinstance(stop, list) else (stop,)
        for string in given["stop"]:
            if not isinstance(string, str):
                raise InvalidRequest(
                    "stop",
                    f"{_show(string)} is no string; it must be a string or a list of strings",
                )
    token_ids = body.get("stop_token_ids")
    if token_ids is not None:
        if not isinstance(token_ids, list):
            raise InvalidRequest(
                "stop_token_ids", f"is {_kind(token_ids)}; it must be a list of integers"
            )
        given["stop_token_ids"] = tuple(_integer("stop_token_ids", token) for token in token_ids)
    if body.get("ignore_eos") is not None:
        given["ignore_eos"] = body["ignore_eos"] is True
    return SamplingParams(max_new_tokens=_max_new_tokens(body, limits), **given)


def _max_new_tokens(body: Mapping[str, Any], limits: RequestLimits) -> int:
    for name in ("max_new_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            tokens = _integer(name, value)
            if not 0 <= tokens < ANY_MAX_NEW_TOKENS:
                raise InvalidRequest(
                    name,
                    f"{_show(value)} is out of range; it must be 0 or more, and counts at most "
                    f"as {limits.max_new_tokens_cap}",
                )
            return min(tokens, limits.max_new_tokens_cap)
    return limits.default_max_new_tokens


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, f"is {_kind(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(field, f"{_show(value)} is not a finite number")
    return number


def _integer(field: str, value: object) -> int:
    """An integer of at most 64 bits; JavaScript's 64.0 is one too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, f"{_show(value)} is not an integer")
    if not -(1 << 63) <= value < 1 << 63:
        raise InvalidRequest(field, f"{_show(value)} is out of range")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a string", bool: "true or false",
        int: "a number", float: "a number",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def _show(value: object) -> str:
    """The value for a message, shortened. Writing out 10**5000 or lists in lists would raise."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of many digits"
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN_CHARS else repr(value[:SHOWN_CHARS]) + "..."
    return repr(value) if isinstance(value, (int, float)) else _kind(value)
