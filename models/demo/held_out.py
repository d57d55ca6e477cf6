"""Questions that training has not seen: other seeds, and every answer often enough to count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from PIL.Image import Image

from models.demo import questions as subject
from models.demo.dialogue import Dialogue, Place, compose, random_system
from models.demo.questions import KIND_WEIGHTS, Balance, Question, questions_about
from models.demo.sampling import photograph, random_scene

LEAST = 32
"""How often each answer occurs at least, of those that are one of few."""
TALK = ("no_picture", "off_subject", "chat")
TALK_SHARE = 0.12
MANY_TURNS = 0.15


@dataclass(frozen=True)
class HeldOut:
    """
    Attributes:
        question: the last of the dialogue, which is the one that counts.
        dialogue: with the true answers to what was asked before it.
        image: None where none is sent.
    """

    question: Question
    dialogue: Dialogue
    image: Image | None

    @property
    def prompt(self) -> str:
        """As a client sends it, up to the last "ASSISTANT:"."""
        earlier = zip(self.dialogue.answers, self.dialogue.later, strict=False)
        return self.dialogue.prompt + "".join(f" {answer}</s>{turn}" for answer, turn in earlier)


def held_out(count: int, seed: str = "held-out") -> list[HeldOut]:
    """At least `count` questions, the same for the same seed."""
    balance = Balance()
    seen: Counter[tuple[str, str]] = Counter()
    found: list[HeldOut] = []
    for index, rng in enumerate(_rngs(seed)):
        few = {key for key in strata() if seen[key] < LEAST * min(1.0, count / 2000)}
        if index >= count and not few:
            return found
        scene = random_scene(rng)
        about = questions_about(scene, rng)
        talk = _talk(rng, about)
        if index >= count:  # only what there is too little of
            about = [question for question in about if (question.kind, question.stratum) in few]
            if (talk.kind, talk.stratum) in few:
                about = [talk]
        if not about:
            continue
        is_talk = about == [talk] or rng.random() < TALK_SHARE
        question = talk if is_talk else balance.pick(rng, about)
        seen[question.kind, question.stratum] += 1
        place: Place = "none"
        image = None
        asked = [question]
        if question.kind not in TALK:
            place = "after" if rng.random() < 0.35 else "before"
            image = photograph(scene, rng)
            if rng.random() < MANY_TURNS:
                asked.insert(0, rng.choice(questions_about(scene, rng)))
        found.append(HeldOut(question, compose(asked, random_system(rng), place, rng), image))
    raise AssertionError("unreachable: the seeds do not end")


def _rngs(seed: str) -> Iterator[Random]:
    index = 0
    while True:
        yield Random(f"{seed}:{index}")
        index += 1


def _talk(rng: Random, about: list[Question]) -> Question:
    kind = rng.random()
    if kind < 0.4:
        return subject.without_picture(rng.choice(about))
    return subject.off_subject(rng) if kind < 0.7 else subject.chat(rng)


@cache
def strata() -> frozenset[tuple[str, str]]:
    """Every (kind, stratum) that a few hundred scenes bring forth."""
    rng = Random("strata")
    asked = [one for _ in range(600) for one in questions_about(random_scene(rng), rng)]
    talk = [_talk(rng, asked) for _ in range(200)]
    assert {one.kind for one in asked} == set(KIND_WEIGHTS)
    return frozenset((one.kind, one.stratum) for one in [*asked, *talk])
