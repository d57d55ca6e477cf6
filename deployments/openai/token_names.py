"""How tokens and their log-probabilities are written in answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity; this is vLLM's."""


@dataclass(frozen=True)
class TokenNames:
    """
    Attributes:
        text: what it adds to a text, with U+FFFD for parts of characters; or its name.
        bytes: the same as it is.
    """

    text: Callable[[int], str]
    bytes: Callable[[int], bytes]


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
