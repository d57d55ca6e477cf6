"""What a question is about, word by word and patch by patch."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest

from models.demo.batches import make_batches
from models.demo.labels import GRID, patch_owners
from models.demo.packing import NO_TARGET
from models.demo.questions import Mention, Question, questions_about
from models.demo.roles import (
    ASKED_ABOUT,
    COMPARED_WITH,
    UNMENTIONED,
    patch_roles,
    word_roles,
)
from models.demo.sampling import random_scene, tower_point
from models.demo.scenes import Scene, SceneObject
from models.demo.tokenizer import train_tokenizer

SCENE = Scene((SceneObject("star", "blue", 0.25, 0.25, 0.3), SceneObject("ring", "red", 0.75)))
QUESTION = Question(
    "side", "It is above.", "Seen from the ring, is the star above or below?", "It is above.",
    (Mention("the star", (0,)), Mention("the ring", (1,))),
)  # fmt: skip


def test_words_have_the_role_of_the_noun_that_they_belong_to():
    text = f"The ring and the star. USER: {QUESTION.text}\n"
    words = list(re.finditer(r"\w+|\S", text))
    roles = word_roles(QUESTION, text, [word.end() for word in words])
    mentioned = [
        (word.group(), role) for word, role in zip(words, roles, strict=True) if role != UNMENTIONED
    ]
    assert mentioned == [
        ("the", COMPARED_WITH), ("ring", COMPARED_WITH), ("the", ASKED_ABOUT), ("star", ASKED_ABOUT)
    ]  # fmt: skip


def test_patches_have_the_role_of_the_object_that_lies_on_them():
    roles = np.array(patch_roles(QUESTION, SCENE)).reshape(GRID, GRID)
    assert roles[1, 1] == ASKED_ABOUT
    assert roles[2, 4] == roles[3, 4] == COMPARED_WITH
    assert roles[0, 5] == roles[5, 0] == UNMENTIONED
    owners = patch_owners(SCENE).reshape(GRID, GRID)
    assert ((owners == 0) == (roles == ASKED_ABOUT)).all()


def test_mentions_stand_in_their_question_and_mean_what_it_asks_about():
    kinds = set()
    for index in range(150):
        rng = Random(f"mentions:{index}")
        scene = random_scene(rng)
        for question in questions_about(scene, rng):
            found = [[scene.objects[i] for i in one.objects] for one in question.mentions]
            if not found:
                continue
            assert all(one.noun.lower() in question.text.lower() for one in question.mentions)
            kinds.add(question.kind)
            if question.kind == "colour":
                assert [f"It is {item.colour}." for item in found[0]] == [question.answer]
            elif question.kind == "exists":
                assert question.answer.startswith("Yes") == bool(found[0])
            elif question.kind == "absent":
                assert found == [[]]
            elif question.kind == "count_of":
                numbers = ("none", "one", "two", "three")
                assert question.answer.endswith(f" {numbers[len(found[0])]}.")
            elif question.kind == "side":
                (it,), (other,) = found
                (x, y), (other_x, other_y) = (tower_point(scene, i.x, i.y) for i in (it, other))
                assert {
                    "above": y < other_y, "below": y > other_y,
                    "left": x < other_x, "right": x > other_x,
                }[question.answer.rstrip(".").split()[-1]]  # fmt: skip
    assert kinds == {"colour", "shape", "where", "side", "exists", "absent", "count_of"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_only_rows_whose_questions_come_first_have_roles(tokenizer):
    assert (next(make_batches(tokenizer, 8, "roles", last_share=0.0)).role == NO_TARGET).all()
    batch = next(make_batches(tokenizer, 24, "roles", last_share=1.0))
    asked, compared = batch.role == ASKED_ABOUT, batch.role == COMPARED_WITH
    on_picture = batch.picture >= 0
    for mentioned in (asked, compared):
        assert (mentioned & on_picture).any() and (mentioned & ~on_picture).any()
    words = tokenizer.decode(batch.ids[compared & ~on_picture].tolist()).split()
    assert set(words) & {"circle", "square", "triangle", "star", "cross", "ring", "object"}
    assert "left" not in words and "ASSISTANT:" not in words
