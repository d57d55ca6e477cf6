"""Draws the playground's example pictures: python -m deployments.playground.draw_examples"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from PIL import Image

from deployments.playground.pages import STATIC
from models.demo import SceneObject, draw, draw_number

EXAMPLES: Mapping[str, Image.Image] = {
    "star-and-circle": draw(
        [
            SceneObject("circle", "red", x=0.29, y=0.52, size=0.34),
            SceneObject("star", "blue", x=0.72, y=0.48, size=0.38),
        ]
    ),
    "three-shapes": draw(
        [
            SceneObject("square", "green", x=0.25, y=0.28, size=0.28),
            SceneObject("triangle", "orange", x=0.74, y=0.3, size=0.3),
            SceneObject("cross", "purple", x=0.5, y=0.74, size=0.3),
        ]
    ),
    "number": draw_number("42", colour="blue"),
    "ring": draw(
        [
            SceneObject("ring", "orange", x=0.5, y=0.28, size=0.36),
            SceneObject("square", "blue", x=0.5, y=0.74, size=0.3),
        ]
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m deployments.playground.draw_examples",
        description="Draw the playground's example pictures again, over those in static/.",
    ).parse_args(arguments)
    for name, picture in EXAMPLES.items():
        colours = picture.quantize(32, method=Image.Quantize.MEDIANCUT)
        colours.save(STATIC / "examples" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
