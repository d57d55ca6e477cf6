"""Random scenes: what people may well draw, and how it then reaches the model.

Lengths are thought of on the square of 96 pixels that the tower sees, whatever the canvas, because
that is where objects must be large enough and far enough apart to be told from one another.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from random import Random

from PIL import Image

from models.demo.scenes import COLOURS, SHAPES, Background, Number, Rgb, Scene, SceneObject

TOWER_SIDE = 96
"""Pixels of the square that the tower sees; the longer edge of a padded picture."""
MIN_GAP = 4.0
"""Pixels there between two objects' boxes."""
ORDER_GAP = 22.0
"""Pixels there between neighbours, from left to right, for their order to be plain."""
OBJECT_SIZES = {1: (22.0, 66.0), 2: (24.0, 40.0), 3: (20.0, 31.0)}
"""By the number of objects: the least and the largest size, in pixels there."""
MIN_CONTRAST = 100.0
"""Distance in RGB between an object and what it lies on."""

OTHER_SHADES: dict[str, Sequence[Rgb]] = {
    "red": ((255, 0, 0), (200, 20, 60)),
    "orange": ((255, 165, 0), (255, 128, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 200, 0), (0, 255, 0)),
    "blue": ((0, 0, 255), (30, 144, 255)),
    "purple": ((128, 0, 128), (155, 89, 182)),
    "black": ((0, 0, 0),),
    "white": ((255, 255, 255),),
}
"""What paint programs and libraries call by the same names."""
BACKGROUNDS: Sequence[Rgb] = (
    *[(255, 255, 255)] * 6, (245, 245, 240), (225, 225, 225), (170, 170, 170), (65, 65, 70),
    (25, 25, 28), (0, 0, 0), (210, 228, 250), (150, 200, 240), (215, 240, 215), (245, 238, 215),
    (250, 222, 225), (232, 220, 245), (215, 190, 150), (110, 75, 50), (25, 35, 80), (20, 60, 40),
    (128, 128, 128), (200, 220, 220),
)  # fmt: skip
FALLBACK_BACKGROUND = (150, 200, 240)
"""In contrast to every colour here."""


def random_scene(rng: Random, *, number_share: float = 0.3, empty_share: float = 0.03) -> Scene:
    """Any scene that the model is trained on."""
    kind = rng.random()
    if kind < empty_share:
        return Scene(size=_canvas_size(rng), background=_background(rng, []))
    if kind < empty_share + number_share:
        return _number_scene(rng)
    return _object_scene(rng, rng.choices((1, 2, 3), (0.24, 0.33, 0.43))[0])


def photograph(scene: Scene, rng: Random) -> Image.Image:
    """The picture of a scene as a client might send it: smooth or not, some through JPEG."""
    longest = max(scene.size)
    image = scene.render(supersampling=rng.choice((1, 2, 2, 3)) if longest < 160 else 1)
    if rng.random() < 0.2:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=rng.randint(35, 95))
        image = Image.open(data)
        image.load()
    return image


def tower_point(scene: Scene, x: float, y: float) -> tuple[float, float]:
    """Fractions of the picture -> pixels of the tower's square, after padding."""
    width, height = scene.size
    scale = TOWER_SIDE / max(width, height)
    return (
        TOWER_SIDE / 2 + (x - 0.5) * width * scale,
        TOWER_SIDE / 2 + (y - 0.5) * height * scale,
    )


def tower_length(scene: Scene, share: float) -> float:
    """A fraction of the shorter edge -> pixels of the tower's square."""
    return share * TOWER_SIDE * min(scene.size) / max(scene.size)


def _canvas_size(rng: Random, least_ratio: float = 0.5, most_ratio: float = 2.0) -> tuple[int, int]:
    """Small ones mostly, which are quick to draw; the tower's square is smaller still."""
    longest = rng.randint(150, 512) if rng.random() < 0.12 else rng.randint(80, 144)
    if rng.random() < 0.5 and least_ratio <= 1 <= most_ratio:
        return longest, longest
    ratio = math.exp(rng.uniform(math.log(least_ratio), math.log(most_ratio)))
    if ratio > 1:
        return longest, max(1, round(longest / ratio))
    return max(1, round(longest * ratio)), longest


def _object_scene(rng: Random, count: int) -> Scene:
    """Pictures that are too tall for objects side by side hold them anyhow, one time in eight."""
    least_ratio = {1: 0.5, 2: 0.65, 3: 0.9}[count] if rng.random() < 0.88 else 0.5
    shapes, colours = _attributes(rng, count)
    shades = [_shade(rng, colour) for colour in colours]
    while True:
        frame = Scene(size=_canvas_size(rng, least_ratio))
        placed = _place(rng, frame, count)
        if placed is None:
            continue
        objects = tuple(
            SceneObject(shape, colour, x, y, size, shade, rng.uniform(-12, 12))
            for shape, colour, shade, (x, y, size) in zip(
                shapes, colours, shades, placed, strict=True
            )
        )
        return Scene(objects, size=frame.size, background=_background(rng, shades))


def _attributes(rng: Random, count: int) -> tuple[list[str], list[str]]:
    """Shapes and colours; repeated ones are far commoner than by chance, for counting them."""
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(list(COLOURS), count)
    if count == 1:
        return shapes, colours
    kind = rng.random()
    if kind < 0.30:
        shapes = [shapes[0]] * count
    elif kind < 0.50:
        shapes[1] = shapes[0]
    elif kind < 0.62:
        colours = [colours[0]] * count
    elif kind < 0.72:
        colours[1] = colours[0]
    order = rng.sample(range(count), count)
    return [shapes[i] for i in order], colours


def _place(rng: Random, frame: Scene, count: int) -> list[tuple[float, float, float]] | None:
    """(x, y, size) of each, in fractions; None if they found no room."""
    width, height = frame.size
    scale = TOWER_SIDE / max(width, height)
    across, down = width * scale, height * scale
    shorter = min(across, down)
    in_order = rng.random() < 0.8 and across >= 24 + (count - 1) * (ORDER_GAP + 2)
    for _ in range(60):
        placed: list[tuple[float, float, float]] = []
        for _ in range(count):
            least, most = OBJECT_SIZES[count]
            size = rng.uniform(least, max(least, min(most, 0.8 * shorter)))
            margin = size / 2 + 2
            if 2 * margin >= shorter:
                return None
            x, y = rng.uniform(margin, across - margin), rng.uniform(margin, down - margin)
            if not all(_apart(x, y, size, other, in_order) for other in placed):
                break
            placed.append((x, y, size))
        else:
            return [(x / across, y / down, size / shorter) for x, y, size in placed]
    return None


def _apart(
    x: float, y: float, size: float, other: tuple[float, float, float], in_order: bool
) -> bool:
    dx, dy = abs(x - other[0]), abs(y - other[1])
    return max(dx, dy) >= (size + other[2]) / 2 + MIN_GAP and (not in_order or dx >= ORDER_GAP)


def _number_scene(rng: Random) -> Scene:
    text = str(rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(10, 99))
    colour = rng.choice([*COLOURS, "black", "black", "black"])
    shade = _shade(rng, colour)
    frame = Scene(size=_canvas_size(rng, 0.6))
    width, height = frame.size
    scale = TOWER_SIDE / max(width, height)
    across, down = width * scale, height * scale
    # A digit takes 0.8 of its height from side to side.
    most = min(66.0, 0.8 * down, 0.9 * across / (0.8 * len(text)))
    tall = rng.uniform(min(26.0, most), most)
    half_width, half_height = 0.4 * tall * len(text) + 1, 0.55 * tall + 2
    x = rng.uniform(min(half_width, across / 2), max(across - half_width, across / 2))
    y = rng.uniform(min(half_height, down / 2), max(down - half_height, down / 2))
    number = Number(
        text, colour, x / across, y / down, tall / min(across, down),
        rng.choice((0.0, 0.02, 0.05)), shade, rng.uniform(-8, 8),
    )  # fmt: skip
    return Scene(number=number, size=frame.size, background=_background(rng, [shade]))


def _shade(rng: Random, colour: str) -> Rgb:
    if rng.random() < 0.3:
        return rng.choice(OTHER_SHADES[colour])
    return _jittered(rng, COLOURS[colour], 10 if colour in {"black", "white"} else 18)


def _background(rng: Random, shades: Sequence[Rgb]) -> Background:
    for _ in range(30):
        start = _jittered(rng, rng.choice(BACKGROUNDS), 8)
        end = None
        if rng.random() < 0.2:
            other = start if rng.random() < 0.6 else rng.choice(BACKGROUNDS)
            end = _jittered(rng, other, 25)
        ends = [start] if end is None else [start, end, _middle(start, end)]
        if all(math.dist(shade, one) >= MIN_CONTRAST for shade in shades for one in ends):
            return Background(start, end, sideways=rng.random() < 0.5)
    return Background(FALLBACK_BACKGROUND)


def _middle(start: Rgb, end: Rgb) -> Rgb:
    return (start[0] + end[0]) // 2, (start[1] + end[1]) // 2, (start[2] + end[2]) // 2


def _jittered(rng: Random, colour: Rgb, spread: int) -> Rgb:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue
