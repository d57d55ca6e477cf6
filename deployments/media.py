"""Pictures from a request's base64 strings, within limits that are checked before decoding.

A string is never taken for a path or fetched as a URL. What the decoder says about hostile bytes
stays here: its messages can hold addresses and paths.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from models.errors import InvalidRequest

logger = logging.getLogger("ray.serve")

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats with decoders that only draw. PIL knows others that start programs (EPS). A phone's MPO
is opened as JPEG; PIL fails on all pictures where it is listed."""
DATA_URL = re.compile(r"\s*data:(?P<type>[^,;]*)(?P<parameters>(;[^,;]*)*),", re.IGNORECASE)
URL = re.compile(r"\s*[a-z][a-z0-9+.-]{1,15}://", re.IGNORECASE)
PREFIX_CHARS = 512
"""Where a prefix is looked for: over megabytes of ";" the search alone takes gigabytes."""
WHITESPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class ImageLimits:
    """
    Attributes:
        max_bytes: of a picture's file, encoded.
        max_pixels: width times height of one picture.
        max_side: longest side, in pixels; models pad to a square, so a thin strip costs its square.
        max_request_pixels: of all pictures of a request together.
    """

    max_bytes: int
    max_pixels: int
    max_side: int
    max_request_pixels: int


def decode_images(
    images: Sequence[str | bytes], limits: ImageLimits, fields: Sequence[str] | None = None
) -> list[Image.Image]:
    """The pictures as RGB: the first frame, upright, transparent parts on white.

    Args:
        images: base64, perhaps in data URLs; the usual and the URL-safe alphabet, line breaks and
            missing padding included. Or files as they are.
        fields: what to call each in messages; default: `images[0]` and so on.

    Raises:
        InvalidRequest: naming the picture.
    """
    fields = fields or [f"images[{i}]" for i in range(len(images))]
    opened = [_open(field, image, limits) for field, image in zip(fields, images, strict=True)]
    pixels = sum(image.width * image.height for image in opened)
    if pixels > limits.max_request_pixels:
        raise InvalidRequest(
            "images",
            f"{pixels} pixels in all pictures together; at most {limits.max_request_pixels}",
        )
    return [_decode(field, image) for field, image in zip(fields, opened, strict=True)]


def _open(field: str, source: str | bytes, limits: ImageLimits) -> Image.Image:
    """Reads a picture's header, no pixel."""
    data = _bytes(field, source, limits.max_bytes) if isinstance(source, str) else source
    if len(data) > limits.max_bytes:
        raise InvalidRequest(field, f"is larger than {limits.max_bytes} bytes")
    too_large = f"at most {limits.max_pixels} pixels and {limits.max_side} on a side are allowed"
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidRequest(field, f"is too large; {too_large}") from None
    except Exception as error:
        logger.info("%s could not be opened: %s", field, type(error).__name__)
        raise InvalidRequest(
            field,
            f"is not a picture in a known format ({', '.join(FORMATS)}); a picture's bytes are "
            "expected, in base64, and neither a path nor text",
        ) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidRequest(field, "has no pixels")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise InvalidRequest(field, f"is {width} x {height} pixels; {too_large}")
    return image


def _bytes(field: str, text: str, max_bytes: int) -> bytes:
    head = DATA_URL.match(text, 0, PREFIX_CHARS)
    if head is not None:
        if not head["parameters"].lower().endswith(";base64"):
            raise InvalidRequest(field, "is a data URL that is not base64")
        kind = head["type"].lower()
        if kind and not kind.startswith(("image/", "application/octet-stream")):
            raise InvalidRequest(field, f"is a data URL of type {kind[:40]!r}, no picture")
        text = text[head.end() :]
    elif URL.match(text, 0, PREFIX_CHARS):
        raise InvalidRequest(
            field, "is a URL, and this server fetches none; send the picture itself, in base64"
        )
    if len(text) // 4 * 3 > max_bytes * 1.1 + 16:  # line breaks included, before any copy of it
        raise InvalidRequest(field, f"is larger than {max_bytes} bytes")
    if not text.isascii():
        raise InvalidRequest(field, "is not base64")
    text = WHITESPACE.sub("", text).rstrip("=")
    if not text:
        raise InvalidRequest(field, "is empty")
    try:
        data = base64.b64decode(
            text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True
        )
    except binascii.Error:
        raise InvalidRequest(
            field, "is not base64; send the picture's bytes in base64, not a path or plain text"
        ) from None
    return data


def _decode(field: str, image: Image.Image) -> Image.Image:
    from models.vision.rgb import to_rgb  # here: it brings torch, which only the replica has loaded

    try:
        image.load()
        return to_rgb(image)
    except Exception as error:
        logger.info("%s could not be decoded: %s", field, type(error).__name__)
        raise InvalidRequest(
            field, f"is a {image.format} picture that is damaged or cut off"
        ) from None
