"""What a picture shows, and how it is drawn.

Positions and sizes are fractions of the picture, so that one scene can be drawn on any canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageColor, ImageDraw, ImageFont

Rgb: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (220, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (35, 150, 60),
    "blue": (35, 80, 215),
    "purple": (140, 50, 170),
    "black": (15, 15, 18),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SUPERSAMPLING = 3
"""A picture is drawn this many times larger and reduced, which smooths its edges."""


@dataclass(frozen=True)
class SceneObject:
    """
    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        x, y: of its centre, fractions of the picture's width and height.
        size: its width and height, as a fraction of the picture's shorter edge.
        rgb: the shade, where it is not the colour's own.
        angle: degrees by which it is turned.
    """

    shape: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.4
    rgb: Rgb | None = None
    angle: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        if self.colour not in COLOURS:
            raise ValueError(f"colour is {self.colour!r}; it must be one of {', '.join(COLOURS)}")

    @property
    def shade(self) -> Rgb:
        return self.rgb or COLOURS[self.colour]


@dataclass(frozen=True)
class Number:
    """Digits written in the picture.

    Attributes:
        text: one or two digits.
        height: of a digit, as a fraction of the picture's shorter edge.
        weight: of the pen: the stroke's extra width, as a fraction of the height.
    """

    text: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    height: float = 0.5
    weight: float = 0.02
    rgb: Rgb | None = None
    angle: float = 0.0

    @property
    def shade(self) -> Rgb:
        return self.rgb or COLOURS[self.colour]


@dataclass(frozen=True)
class Background:
    """
    Attributes:
        start: the colour; of the top, where `end` is given.
        end: the colour of the bottom (or right, if `sideways`), for a soft gradient.
    """

    start: Rgb = (255, 255, 255)
    end: Rgb | None = None
    sideways: bool = False

    def paint(self, width: int, height: int) -> Image.Image:
        if self.end is None:
            return Image.new("RGB", (width, height), self.start)
        ends = Image.new("RGB", (2, 1) if self.sideways else (1, 2))
        ends.putpixel((0, 0), self.start)
        ends.putpixel((1, 0) if self.sideways else (0, 1), self.end)
        return ends.resize((width, height), Image.Resampling.BILINEAR)

    def at(self, x: float, y: float) -> Rgb:
        """The colour there, in fractions of the picture."""
        if self.end is None:
            return self.start
        along = x if self.sideways else y
        # PIL samples at the centres of the two pixels, so that a quarter at each end is flat.
        share = min(max(2 * along - 0.5, 0.0), 1.0)
        red, green, blue = (
            round(start + share * (end - start))
            for start, end in zip(self.start, self.end, strict=True)
        )
        return red, green, blue


@dataclass(frozen=True)
class Scene:
    """One picture's content: some objects, or a number, or nothing.

    Attributes:
        size: of the canvas, (width, height) in pixels.
    """

    objects: tuple[SceneObject, ...] = ()
    number: Number | None = None
    size: tuple[int, int] = (336, 336)
    background: Background = Background()

    def render(self, supersampling: int = SUPERSAMPLING) -> Image.Image:
        """The picture, RGB."""
        width, height = (edge * supersampling for edge in self.size)
        canvas = self.background.paint(width, height)
        pen = ImageDraw.Draw(canvas)
        for item in self.objects:
            behind = self.background.at(item.x, item.y)
            _draw_object(pen, item, width, height, behind)
        if self.number is not None:
            _draw_number(canvas, self.number)
        return canvas if supersampling == 1 else canvas.reduce(supersampling)


def draw(
    objects: Sequence[SceneObject],
    size: tuple[int, int] = (336, 336),
    background: str | Rgb = "white",
) -> Image.Image:
    """A picture of known content.

    Args:
        size: (width, height) in pixels.
        background: a name or "#rrggbb" that PIL knows, or (red, green, blue).
    """
    return Scene(tuple(objects), size=size, background=Background(_rgb(background))).render()


def draw_number(
    text: str,
    size: tuple[int, int] = (336, 336),
    background: str | Rgb = "white",
    colour: str = "black",
) -> Image.Image:
    """A picture of a written number."""
    number = Number(text, colour, height=min(0.6, 0.9 * size[0] / min(size) / len(text)))
    return Scene(number=number, size=size, background=Background(_rgb(background))).render()


def simple_scene(
    colour: str,
    shape: str,
    size: tuple[int, int] = (336, 336),
    background: str | Rgb = "white",
) -> Image.Image:
    """One object in the middle. (A white one needs another background to be seen.)"""
    return draw([SceneObject(shape, colour)], size, background)


def _rgb(colour: str | Rgb) -> Rgb:
    if not isinstance(colour, str):
        return colour
    return ImageColor.getrgb(colour)[:3]


def _draw_object(
    pen: ImageDraw.ImageDraw, item: SceneObject, width: int, height: int, behind: Rgb
) -> None:
    centre = (item.x * width, item.y * height)
    radius = item.size * min(width, height) / 2
    fill = item.shade
    if item.shape == "circle":
        pen.ellipse(_box(centre, radius), fill)
    elif item.shape == "ring":
        pen.ellipse(_box(centre, radius), fill)
        pen.ellipse(_box(centre, 0.56 * radius), behind)
    else:
        pen.polygon(_outline(item.shape, centre, radius, math.radians(item.angle)), fill)


def _box(centre: Point, radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _outline(shape: str, centre: Point, radius: float, angle: float) -> list[Point]:
    """The corners, clockwise. A square's side is the size; others fit into that square."""
    if shape == "square":
        corners: list[Point] = [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)]
    elif shape == "triangle":
        corners = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "cross":
        arm = 0.34
        quarter: list[Point] = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        corners = [_turned(point, k * math.pi / 2) for k in range(4) for point in quarter]
    else:
        radii = (1.05, 0.44)
        corners = [
            (radii[k % 2] * math.sin(k * math.pi / 5), -radii[k % 2] * math.cos(k * math.pi / 5))
            for k in range(10)
        ]
    turned = [_turned(point, angle) for point in corners]
    return [(centre[0] + radius * x, centre[1] + radius * y) for x, y in turned]


def _turned(point: Point, angle: float) -> Point:
    x, y = point
    cosine, sine = math.cos(angle), math.sin(angle)
    return x * cosine - y * sine, x * sine + y * cosine


def _draw_number(canvas: Image.Image, number: Number) -> None:
    """In Pillow's own font, so that no font has to be installed."""
    shorter = min(canvas.size)
    # The font's digits are 0.72 of its nominal size.
    font = ImageFont.load_default(max(4.0, number.height * shorter / 0.72))
    stroke = round(number.weight * number.height * shorter)
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = pen.textbbox((0, 0), number.text, font, stroke_width=stroke)
    margin = 2 + stroke
    size = (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text(
        (margin - left, margin - top), number.text, 255, font, stroke_width=stroke
    )
    if number.angle:
        mask = mask.rotate(number.angle, Image.Resampling.BILINEAR, expand=True)
    corner = (
        round(number.x * canvas.width - mask.width / 2),
        round(number.y * canvas.height - mask.height / 2),
    )
    canvas.paste(number.shade, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
