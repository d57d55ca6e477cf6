"""What lies on each patch of the tower's square: labels for an auxiliary loss in training.

With them the tower learns to see within minutes; from answers alone it would take far longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.demo.sampling import TOWER_SIDE, tower_length, tower_point
from models.demo.scenes import COLOURS, SHAPES, Scene

PATCH = 16
GRID = TOWER_SIDE // PATCH
CENTRES = (np.arange(GRID) + 0.5) * PATCH
NOTHING, PADDING = 0, 1
"""Of the first label, where 2 and more are shapes, then digits."""
SIZES = (2 + len(SHAPES) + 10, 1 + len(COLOURS), 4, 4)
"""How many values each label has: what, colour, column and row (of three, 0 where nothing is)."""
DIGIT_STEP = 0.8
"""Between the centres of two digits, as a fraction of their height; the font's."""
FIRST_WITH_WORD = (2, 1, 1, 1)
"""The first value of each label that has a word."""
WORDS: tuple[tuple[str, ...], ...] = (
    (*SHAPES, *"0123456789"),
    tuple(COLOURS),
    ("left", "middle", "right"),
    ("top", "middle", "bottom"),
)
"""For each label the words of its values, from `FIRST_WITH_WORD` on."""


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """(GRID * GRID, len(SIZES)): for each patch, row by row."""
    labels = np.zeros((GRID, GRID, len(SIZES)), dtype=np.int64)
    left, top = tower_point(scene, 0, 0)
    right, bottom = tower_point(scene, 1, 1)
    labels[(top > CENTRES) | (bottom < CENTRES), :, 0] = PADDING
    labels[:, (left > CENTRES) | (right < CENTRES), 0] = PADDING
    colours = list(COLOURS)
    flat = labels.reshape(GRID * GRID, len(SIZES))
    items = _items(scene)
    owners = _owners(items)
    for index, (what, colour, _, _, column, row) in enumerate(items):
        flat[owners == index] = (2 + what, 1 + colours.index(colour), 1 + column, 1 + row)
    return flat


def patch_owners(scene: Scene) -> NDArray[np.int64]:
    """(GRID * GRID,): which of the scene's objects, or of its digits, lies on each patch, or -1."""
    return _owners(_items(scene))


def _owners(items: Sequence[_Item]) -> NDArray[np.int64]:
    """The nearest of those that cover a good part of the patch."""
    owners = np.full((GRID, GRID), -1, dtype=np.int64)
    nearest = np.full((GRID, GRID), np.inf)
    for index, (_, _, (x, y), (half_width, half_height), _, _) in enumerate(items):
        dx, dy = np.abs(CENTRES - x)[None, :], np.abs(CENTRES - y)[:, None]
        touched = (dx < half_width + 0.28 * PATCH) & (dy < half_height + 0.28 * PATCH)
        distance = np.hypot(dx, dy)
        mine = touched & (distance < nearest)
        nearest[mine] = distance[mine]
        owners[mine] = index
    return owners.reshape(-1)


_Item = tuple[int, str, tuple[float, float], tuple[float, float], int, int]


def _items(scene: Scene) -> list[_Item]:
    """(what, colour, centre, half extents, column, row) of each object or digit."""
    items: list[_Item] = []
    for one in scene.objects:
        half = tower_length(scene, one.size) / 2
        what, centre = SHAPES.index(one.shape), tower_point(scene, one.x, one.y)
        items.append((what, one.colour, centre, (half, half), *_thirds(one.x, one.y)))
    number = scene.number
    if number is not None:
        height = tower_length(scene, number.height)
        x, y = tower_point(scene, number.x, number.y)
        first = x - (len(number.text) - 1) * DIGIT_STEP * height / 2
        for index, digit in enumerate(number.text):
            centre = (first + index * DIGIT_STEP * height, y)
            half_extents = (0.37 * height, 0.5 * height)
            column, row = _thirds(number.x, number.y)
            what = len(SHAPES) + int(digit)
            items.append((what, number.colour, centre, half_extents, column, row))
    return items


def _thirds(x: float, y: float) -> tuple[int, int]:
    return min(2, int(3 * x)), min(2, int(3 * y))
