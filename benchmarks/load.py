"""The questions that are asked, and what is noted of the answers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import median

from models.demo.sampling import random_scene
from models.prompts import Message, get_template

TEXTS = (
    "What is in this image?",
    "What colour is the largest object?",
    "How many objects are there?",
    "Which number is written here?",
)
CANVAS = (336, 336)


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        picture: a PNG file.
    """

    prompt: str
    picture: bytes


def make_questions(first: int, count: int, *, same_picture: bool = False) -> list[Question]:
    """Questions number `first` and following. No two of them have the same picture, so that
    neither the cache of pictures nor that of prefixes can answer for the model."""
    template = get_template("vicuna_v1")
    return [
        Question(
            template.render([Message("user", f"<image>\n{TEXTS[number % len(TEXTS)]}")]),
            _picture(0 if same_picture else number),
        )
        for number in range(first, first + count)
    ]


def _picture(number: int) -> bytes:
    scene = random_scene(Random(number), empty_share=0)
    file = io.BytesIO()
    replace(scene, size=CANVAS).render().save(file, "PNG")
    return file.getvalue()


@dataclass
class Answer:
    """One answer as its client saw it. Times are seconds of `time.monotonic()`.

    Attributes:
        sent: when the question left.
        arrivals: (time, tokens that are there by then), where new ones have come.
    """

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def arrived(self, time: float, new_tokens: int) -> None:
        self.arrivals.append((time, self.num_tokens + new_tokens))

    @property
    def num_tokens(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ended(self) -> float:
        return self.arrivals[-1][0]

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0][0] - self.sent

    @property
    def token_s(self) -> float:
        """Per token, after those that came first."""
        (start, early), (end, all_tokens) = self.arrivals[0], self.arrivals[-1]
        return (end - start) / max(1, all_tokens - early)

    def waits_s(self) -> Iterator[float]:
        """Of each token, at most how long it had been there when it arrived: since the arrival
        before it, had it come right after that one."""
        for (before, had), (now, have) in zip(self.arrivals, self.arrivals[1:], strict=False):
            yield from [now - before] * (have - had)


@dataclass(frozen=True)
class Round:
    """As many questions as there are streams, asked at once.

    Attributes:
        tokens_per_s: of all streams together, from the first question to the last token.
        first_token_s, token_s: the median stream's.
        wait_p99_s: 99 % of the tokens waited at most that long; see `Answer.waits_s`.
    """

    tokens_per_s: float
    first_token_s: float
    token_s: float
    wait_p99_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Round:
        start = min(answer.sent for answer in answers)
        end = max(answer.ended for answer in answers)
        waits = sorted(wait for answer in answers for wait in answer.waits_s())
        return cls(
            tokens_per_s=sum(answer.num_tokens for answer in answers) / (end - start),
            first_token_s=median(answer.first_token_s for answer in answers),
            token_s=median(answer.token_s for answer in answers),
            wait_p99_s=waits[int(0.99 * (len(waits) - 1))] if waits else 0.0,
        )
