"""The body of a `/worker_generate_stream` request, checked and completed.

Keys that are not read here (`model`, `stream`, `n_keep`, ...) are ignored, and null means absent:
the protocol's clients send more than its workers ever understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config import ANY_MAX_NEW_TOKENS
from deployments.fields import integer, kind, number, show
from models import SamplingParams
from models.errors import InvalidRequest

IMAGE_PLACEHOLDER = "<image>"
FASTCHAT_PLACEHOLDER = "$$<image>$$"
"""What FastChat's OpenAI server of 2024 puts before the text, for a worker to replace."""


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
            raise InvalidRequest("body", f"is {kind(body)}; it must be a JSON object")
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
        raise InvalidRequest("prompt", f"is {kind(prompt)}; it must be a string")
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
        raise InvalidRequest("images", f"is {kind(images)}; it must be a list of base64 strings")
    if len(images) > limits.max_images:
        raise InvalidRequest("images", f"{len(images)} pictures; at most {limits.max_images}")
    for index, image in enumerate(images):
        if not isinstance(image, str):
            raise InvalidRequest(
                f"images[{index}]", f"is {kind(image)}; it must be a base64 string"
            )
    return tuple(images)


def _sampling_params(body: Mapping[str, Any], limits: RequestLimits) -> SamplingParams:
    given: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if body.get(name) is not None:
            given[name] = number(name, body[name])
    for name in ("top_k", "seed"):
        if body.get(name) is not None:
            given[name] = integer(name, body[name])
    stop = body.get("stop")
    if stop is not None:
        given["stop"] = tuple(stop) if isinstance(stop, list) else (stop,)
        for string in given["stop"]:
            if not isinstance(string, str):
                raise InvalidRequest(
                    "stop",
                    f"{show(string)} is no string; it must be a string or a list of strings",
                )
    token_ids = body.get("stop_token_ids")
    if token_ids is not None:
        if not isinstance(token_ids, list):
            raise InvalidRequest(
                "stop_token_ids", f"is {kind(token_ids)}; it must be a list of integers"
            )
        given["stop_token_ids"] = tuple(integer("stop_token_ids", token) for token in token_ids)
    if body.get("ignore_eos") is not None:
        given["ignore_eos"] = body["ignore_eos"] is True
    return SamplingParams(max_new_tokens=_max_new_tokens(body, limits), **given)


def _max_new_tokens(body: Mapping[str, Any], limits: RequestLimits) -> int:
    for name in ("max_new_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            tokens = integer(name, value)
            if not 0 <= tokens < ANY_MAX_NEW_TOKENS:
                raise InvalidRequest(
                    name,
                    f"{show(value)} is out of range; it must be 0 or more, and counts at most "
                    f"as {limits.max_new_tokens_cap}",
                )
            return min(tokens, limits.max_new_tokens_cap)
    return limits.default_max_new_tokens
