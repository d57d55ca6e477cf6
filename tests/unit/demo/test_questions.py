"""The answers are true of the scenes, worked out here in another way."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from models.demo.held_out import LEAST, TALK, held_out, strata
from models.demo.questions import COUNTS, KIND_WEIGHTS, Balance, questions_about
from models.demo.sampling import random_scene
from models.demo.scenes import COLOURS, SHAPES, Scene, SceneObject

COUNT_WORDS = {"none": 0, "one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def asked():
    out = []
    for index in range(500):
        rng = Random(f"questions:{index}")
        scene = random_scene(rng)
        out += [(scene, question) for question in questions_about(scene, rng)]
    return out


def _named(text: str, scene: Scene) -> list[list[SceneObject]]:
    """What each "the red circle", "a star", "red objects" in a question can mean."""
    text = text.lower().replace("crosses", "cross")
    groups = []
    noun = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|object|shape|thing|one)\b"
    for colour, shape in re.findall(rf"(?:the|an?|many|count|of) (?:the )?{noun}", _singular(text)):
        groups.append([
            item for item in scene.objects
            if colour in {"", item.colour} and (shape not in SHAPES or shape == item.shape)
        ])  # fmt: skip
    return groups


def _singular(text: str) -> str:
    return re.sub(rf"\b({'|'.join(SHAPES)}|object|shape|thing)s\b", r"\1", text)


def _of_kind(asked, *kinds):
    chosen = [(scene, one) for scene, one in asked if one.kind in kinds]
    assert len(chosen) > 20
    return chosen


def test_every_kind_is_asked(asked):
    assert {question.kind for _, question in asked} == set(KIND_WEIGHTS)


def test_descriptions_name_the_objects_from_left_to_right(asked):
    for scene, question in _of_kind(asked, "describe_1", "describe_2", "describe_3"):
        ordered = sorted(scene.objects, key=lambda item: item.x * scene.size[0])
        found = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question.answer)
        assert found == [(item.colour, item.shape) for item in ordered]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question.answer)


def test_colours_and_shapes_are_those_of_the_only_object_that_is_meant(asked):
    for scene, question in _of_kind(asked, "colour", "shape"):
        value = question.answer.removeprefix("It is ").rstrip(".").split()[-1]
        if scene.number is not None:
            assert value == scene.number.colour
            continue
        meant = _meant(question.text, scene)
        assert value == (meant.colour if question.kind == "colour" else meant.shape)


def test_counts_are_right(asked):
    for scene, question in _of_kind(asked, "count", "count_of", "empty"):
        if question.kind == "empty":
            assert not scene.objects and scene.number is None
            continue
        number = COUNT_WORDS[question.answer.rstrip(".").split()[-1]]
        assert COUNTS[number] == question.answer
        if question.kind == "count":
            assert number == len(scene.objects)
        else:
            assert number == len(_named(question.text, scene)[0])


def test_yes_and_no_are_right(asked):
    for scene, question in _of_kind(asked, "exists"):
        there = question.answer.startswith("Yes")
        groups = _named(question.text, scene)
        if "number" in question.text.lower():
            assert there == (scene.number is not None)
        elif groups:
            assert there == bool(groups[0])
        else:  # a dog
            assert not there


def test_what_is_said_to_be_absent_is_absent(asked):
    for scene, question in _of_kind(asked, "absent"):
        if question.answer == "There is no number.":
            assert scene.number is None
        else:
            assert _named(f"the {question.answer.removeprefix('There is no ')}", scene) == [[]]


def test_sides_are_right(asked):
    for scene, question in _of_kind(asked, "side"):
        text = question.text.lower()
        groups = [group for group in _named(text, scene) if len(group) == 1]
        first, second = (group[0] for group in groups[:2])
        # "on which side of the other is it" and "seen from the other" name the other first.
        if re.search(r"side of|seen from", text):
            first, second = second, first
        side = question.answer.rstrip(".").split()[-1]
        truth = {
            "left": first.x < second.x, "right": first.x > second.x,
            "above": first.y < second.y, "below": first.y > second.y,
        }  # fmt: skip
        assert truth[side]


def test_places_are_right(asked):
    for scene, question in _of_kind(asked, "where"):
        item = _meant(question.text, scene)
        place = question.answer
        assert ("top" in place) == (item.y < 1 / 3)
        assert ("bottom" in place) == (item.y > 2 / 3)
        assert ("left" in place) == (item.x < 1 / 3)
        assert ("right" in place) == (item.x > 2 / 3)


def test_numbers_are_those_written(asked):
    for scene, question in _of_kind(asked, "number", "describe_number"):
        assert scene.number is not None
        assert re.findall(r"\d+", question.answer) == [scene.number.text]


def _meant(text: str, scene: Scene) -> SceneObject:
    groups = [group for group in _named(text, scene) if len(group) == 1]
    if not groups:  # "what colour is it?", of a picture with one object
        (item,) = scene.objects
        return item
    return groups[0][0]


def test_the_balance_evens_out_rare_answers():
    balance, picked = Balance(), Counter()
    for index in range(3000):
        rng = Random(f"balance:{index}")
        question = balance.pick(rng, questions_about(random_scene(rng), rng))
        picked[question.kind, question.stratum] += 1
    for kind in ("count", "count_of", "where", "side", "exists"):
        of_kind = [number for (one, _), number in picked.items() if one == kind]
        assert max(of_kind) < 6 * min(of_kind), kind


def test_held_out_questions_cover_every_answer_and_do_not_change():
    items = held_out(2000)
    counts = Counter((item.question.kind, item.question.stratum) for item in items)
    assert len(items) >= 2000
    assert set(counts) == strata()
    assert min(counts.values()) >= LEAST >= 30
    assert all((item.image is None) == (item.question.kind in TALK) for item in items)
    assert all(item.prompt.count("<image>") == (item.image is not None) for item in items)
    again = held_out(40)
    assert [(item.prompt, item.question) for item in again] == [
        (item.prompt, item.question) for item in held_out(40)
    ]
