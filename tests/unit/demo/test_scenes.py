"""Drawn pictures: the same for the same seed, and showing what they say they show."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import numpy as np
import pytest

from models.demo import COLOURS, SHAPES, SceneObject, draw, draw_number, simple_scene
from models.demo.sampling import MIN_CONTRAST, photograph, random_scene, tower_point
from models.demo.scenes import Background, Scene


def _scenes(count: int, seed: str = "test") -> list[tuple[Scene, Random]]:
    return [
        (random_scene(rng), rng) for rng in (Random(f"{seed}:{index}") for index in range(count))
    ]


def test_the_same_seed_gives_the_same_pictures():
    first = [photograph(scene, rng).tobytes() for scene, rng in _scenes(40)]
    assert first == [photograph(scene, rng).tobytes() for scene, rng in _scenes(40)]
    assert len(set(first)) == 40


@pytest.mark.parametrize(("colour", "shape"), product(COLOURS, SHAPES))
def test_a_simple_scene_holds_its_colour_in_the_middle_of_its_background(colour, shape):
    image = simple_scene(colour, shape, size=(90, 60), background="#96c8f0")
    pixels = np.asarray(image).reshape(-1, 3)
    assert image.size == (90, 60)
    assert (pixels == COLOURS[colour]).all(axis=1).sum() > 60
    assert tuple(pixels[0]) == (0x96, 0xC8, 0xF0)


def test_objects_lie_where_they_are_said_to_lie():
    image = draw(
        [SceneObject("square", "red", 0.2, 0.3, 0.2), SceneObject("circle", "blue", 0.8, 0.7, 0.2)],
        size=(200, 100),
    )
    assert image.getpixel((40, 30)) == COLOURS["red"]
    assert image.getpixel((160, 70)) == COLOURS["blue"]
    assert image.getpixel((100, 50)) == (255, 255, 255)


def test_a_ring_shows_the_background_through_its_hole():
    background = Background((255, 255, 255), (40, 40, 40))
    scene = Scene((SceneObject("ring", "red"),), size=(64, 64), background=background)
    empty = Scene(size=(64, 64), background=background)
    assert math.dist(scene.render().getpixel((32, 32)), empty.render().getpixel((32, 32))) < 8


@pytest.mark.parametrize("text", ["7", "42"])
def test_a_number_fits_into_its_picture(text):
    dark = np.asarray(draw_number(text, size=(120, 60)).convert("L")) < 128
    assert 200 < dark.sum() < dark.size / 2
    assert not dark[0].any() and not dark[-1].any()
    assert not dark[:, 0].any() and not dark[:, -1].any()


@pytest.mark.parametrize(("shape", "colour"), [("hexagon", "red"), ("circle", "mauve")])
def test_an_unknown_shape_or_colour_is_refused(shape, colour):
    with pytest.raises(ValueError, match="must be one of"):
        SceneObject(shape, colour)


def test_random_objects_stay_inside_apart_and_visible():
    for scene, _ in _scenes(400):
        boxes = []
        for item in scene.objects:
            x, y = item.x * scene.size[0], item.y * scene.size[1]
            half = item.size * min(scene.size) / 2
            assert half < x < scene.size[0] - half
            assert half < y < scene.size[1] - half
            boxes.append((x, y, half))
            assert math.dist(item.shade, scene.background.start) >= MIN_CONTRAST
        for index, (x, y, half) in enumerate(boxes):
            for other_x, other_y, other_half in boxes[:index]:
                assert max(abs(x - other_x), abs(y - other_y)) > half + other_half


def test_padding_is_reckoned_with():
    wide = Scene(size=(200, 100))
    assert tower_point(wide, 0, 0) == (0, 24)
    assert tower_point(wide, 1, 1) == (96, 72)
    assert tower_point(Scene(size=(50, 50)), 0.25, 0.75) == (24, 72)
