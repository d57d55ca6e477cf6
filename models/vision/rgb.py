"""Any picture that PIL opens -> RGB as its sender sees it on a screen."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image, ImageOps

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
"""More than eight bits a pixel, which PIL's own conversion clips instead of scaling."""
WHITE = (255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """What a viewer shows: upright, transparency over white, the first frame, deep grey scaled.

    - EXIF's orientation is applied; EXIF data that cannot be read is passed over.
    - Anything transparent (an alpha channel, a transparent palette entry or colour key) is laid
      over white.
    - 16-bit and 32-bit grey is scaled from 0..65535, or taken as 0..255 if no pixel is beyond;
      floating point from 0..1, if no pixel is beyond, and else as integers are.
    - Palettes, grey, black and white, CMYK, YCbCr and Lab: PIL's conversion.
    """
    if getattr(image, "is_animated", False) and image.tell() != 0:
        image.seek(0)
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in DEEP_MODES:
        return _from_deep(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        canvas = Image.new("RGBA", layers.size, (*WHITE, 255))
        return Image.alpha_composite(canvas, layers).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()  # a PNG's EXIF data may lie behind its pixels
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # the transposition of nothing would be a copy
        return ImageOps.exif_transpose(image)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        SyntaxError,
        struct.error,
    ):
        return image  # the orientation is a hint, and these pixels have been decoded


def _from_deep(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=65535.0, neginf=0.0)
    largest = values.max(initial=0.0)
    if image.mode == "F" and largest <= 1.0:
        values = values * 255.0
    elif largest > 255.0 or image.mode.startswith("I;16"):
        values = values / 257.0
    grey = np.rint(values.clip(0.0, 255.0)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
