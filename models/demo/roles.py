"""Which words and patches a question is about: labels for an auxiliary loss in training.

Where the picture comes after its question, its patches can find their own names in the question.
That one of two names is asked about and the other only compared with ("Is the star above the
ring?") is not found from answers alone in thousands of steps, and within two hundred with these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.demo.labels import patch_owners
from models.demo.questions import Question
from models.demo.scenes import Scene

UNMENTIONED, ASKED_ABOUT, COMPARED_WITH = range(3)
ROLES = 3


def word_roles(question: Question, text: str, ends: Sequence[int]) -> list[int]:
    """Of each token.

    Args:
        text: the tokens' text, in which the question stands.
        ends: where in `text` each token ends.
    """
    roles = np.full(len(text) + 1, UNMENTIONED)
    start = text.index(question.text)
    for role, mention in enumerate(question.mentions, start=ASKED_ABOUT):
        at = text.lower().index(mention.noun.lower(), start)
        roles[at : at + len(mention.noun)] = role
    return [int(roles[end - 1]) for end in ends]


def patch_roles(question: Question, scene: Scene) -> list[int]:
    """Of each patch of the tower's square, row by row."""
    owners = patch_owners(scene)
    roles = np.full(len(owners), UNMENTIONED)
    for role, mention in enumerate(question.mentions, start=ASKED_ABOUT):
        roles[np.isin(owners, mention.objects)] = role
    out: list[int] = roles.tolist()
    return out
