"""How the next token is chosen, and when to stop."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from models.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, as TinyChat and FastChat do."""
GREEDY_TOP_P = 1e-8
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """The sampling side of one request. Names and meanings are vLLM's.

    Attributes:
        temperature: divides the logits; below 1e-5 sampling is greedy.
        top_p: keeps the smallest set of tokens whose probability reaches it; (0, 1], and below
            1e-8 greedy.
        top_k: keeps that many likeliest tokens; -1 or 0 keeps all.
        min_p: drops tokens less likely than this share of the likeliest; [0, 1].
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely.
        max_new_tokens: how many tokens at most; 0 is allowed and generates none.
        stop: the text ends before the first of these strings.
        stop_token_ids: tokens that end the answer, besides the model's own.
        seed: makes a sampled answer reproducible, whatever else the engine is running.
        ignore_eos: go on after the model's end-of-sequence token (for load tests).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, sys.float_info.max, "a number of 0 or more")
        _number("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")
        _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "a positive number")
        _integer("top_k", self.top_k, -1, "-1 (off) or a positive integer")
        _integer("max_new_tokens", self.max_new_tokens, 0, "an integer of 0 or more")
        if self.seed is not None:
            _integer("seed", self.seed, None, "an integer")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if not isinstance(self.stop_token_ids, (list, tuple)):
            raise InvalidRequest("stop_token_ids", f"{self.stop_token_ids!r:.80} is not a list")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, "a list of token ids")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_p < GREEDY_TOP_P


def _number(field: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, f"{value!r:.80} is not a number; it must be {expected}")
    if not low <= value <= high:  # so written that it also catches what is not a number
        raise InvalidRequest(field, f"{value!r:.80} is out of range; it must be {expected}")


def _integer(field: str, value: object, low: int | None, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, f"{value!r:.80} is not an integer; it must be {expected}")
    if low is not None and value < low:
        raise InvalidRequest(field, f"{value!r:.80} is out of range; it must be {expected}")


def _stop_strings(value: object) -> tuple[str, ...]:
    """Accepts a string too, since a bare `stop="###"` would otherwise stop at every '#'."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise InvalidRequest("stop", f"{value!r:.80} is not a string or a list of strings")
    kept = tuple(s for s in strings if s)
    if len(kept) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"{len(kept)} strings; at most {MAX_STOP_STRINGS} are allowed")
    if any(len(s) > MAX_STOP_STRING_CHARS for s in kept):
        raise InvalidRequest("stop", f"a string has more than {MAX_STOP_STRING_CHARS} characters")
    return kept
