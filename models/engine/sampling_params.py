"""How the next token is chosen, and when to stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from models.engine.guide import Guide
from models.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, as TinyChat and FastChat do."""
GREEDY_TOP_P = 1e-8
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20

LogitBias = tuple[tuple[int, float], ...]


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
        presence_penalty: is subtracted from the logits of the tokens of the output; -2 to 2.
        frequency_penalty: the same, times how often a token is in the output.
        logit_bias: is added to the logits, by token id; -100 (never) to 100 (always). A mapping,
            or pairs; kept as pairs.
        max_new_tokens: how many tokens at most; 0 is allowed and generates none.
        stop: the text ends before the first of these strings.
        stop_token_ids: tokens that end the answer, besides the model's own.
        min_tokens: how many tokens come before anything may end the answer, the end of what
            `guide` allows excepted.
        seed: makes a sampled answer repeatable: every draw depends on it and on the token's place
            alone, not on what else the engine is running. The probabilities that are drawn from
            repeat to the last bit in float32 only. In 16 bits their rounding depends on how many
            tokens are computed together, so that an answer can differ, the sooner the higher the
            temperature, when the prefix cache holds more of the prompt than the last time, or
            when other requests share its steps.
        ignore_eos: go on after the model's end-of-sequence token (for load tests).
        logprobs: None, or that many of the likeliest tokens come with every token's
            log-probability; 0 to 20. They are the model's own, before penalties, biases and
            temperature, but among the tokens that `guide` allows; so are vLLM's by default.
        prompt_logprobs: the same for the tokens of the prompt, unguided; all of it is then
            computed, whatever the prefix cache holds. With `max_new_tokens` of 0 that is all that
            is done.
        guide: the form that the answer must have.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | LogitBias = ()
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, sys.float_info.max, "a number of 0 or more")
        _number("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")
        _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "a positive number")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "a number from -2 to 2")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "a number from -2 to 2")
        _integer("top_k", self.top_k, -1, "-1 (off) or a positive integer")
        _integer("max_new_tokens", self.max_new_tokens, 0, "an integer of 0 or more")
        _integer("min_tokens", self.min_tokens, 0, "an integer of 0 or more")
        if self.min_tokens > self.max_new_tokens:
            raise InvalidRequest(
                "min_tokens", f"{self.min_tokens} is more than the {self.max_new_tokens} at most"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, f"an integer from 0 to {MAX_LOGPROBS}")
                if value > MAX_LOGPROBS:
                    raise InvalidRequest(name, f"{value}; at most {MAX_LOGPROBS}")
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InvalidRequest("guide", f"{self.guide!r:.80} is not a Guide")
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.seed is not None:
            _integer("seed", self.seed, None, "an integer")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if not isinstance(self.stop_token_ids, (list, tuple)):
            raise InvalidRequest("stop_token_ids", f"{self.stop_token_ids!r:.80} is not a list")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, "a list of token ids")

    @property
    def biases(self) -> LogitBias:
        """`logit_bias` as it is kept."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def needs_nothing(self) -> bool:
        """Whether there is nothing to compute."""
        return self.max_new_tokens == 0 and self.prompt_logprobs is None

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


def _logit_bias(value: object) -> LogitBias:
    try:
        pairs = tuple(dict(value).items())  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise InvalidRequest(
            "logit_bias", f"{value!r:.80} does not map token ids to numbers"
        ) from None
    if len(pairs) > MAX_LOGIT_BIASES:
        raise InvalidRequest("logit_bias", f"{len(pairs)} tokens; at most {MAX_LOGIT_BIASES}")
    for token, bias in pairs:
        _integer("logit_bias", token, 0, "a token id")
        _number("logit_bias", bias, -100.0, 100.0, "a number from -100 to 100")
    return pairs


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
