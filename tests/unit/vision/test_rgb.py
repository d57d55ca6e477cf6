"""Whatever PIL opens becomes the RGB picture that its sender sees."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.vision.rgb import to_rgb

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """Through a file's bytes and back, as pictures come in requests."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (4, 2), left)  # type: ignore[arg-type]
    image.paste(right, (2, 0, 4, 2))  # type: ignore[arg-type]
    return image


def colours(image: Image.Image) -> tuple[object, object]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (4, 2)
    return rgb.getpixel((0, 0)), rgb.getpixel((3, 1))


def palette(colour: tuple[int, int, int], other: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*colour, *other])
    image.paste(1, (2, 0, 4, 2))
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (halves("RGB", RED, BLUE), (RED, BLUE)),
        (halves("L", 0, 255), (BLACK, WHITE)),
        (halves("1", 0, 1), (BLACK, WHITE)),
        (halves("RGBA", (*RED, 255), (*BLUE, 0)), (RED, WHITE)),
        (halves("RGBA", (*BLACK, 128), (*RED, 255)), ((127, 127, 127), RED)),
        (halves("LA", (0, 255), (0, 0)), (BLACK, WHITE)),
        (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), (RED, BLACK)),
        (halves("HSV", (0, 255, 255), (170, 255, 255)), (RED, BLUE)),
        (palette(RED, BLUE), (RED, BLUE)),
        (halves("I;16", 0, 65535), (BLACK, WHITE)),
        (halves("I;16", 0, 257 * 100), (BLACK, (100, 100, 100))),
        (halves("I", 0, 65535), (BLACK, WHITE)),
        (halves("I", 0, 200), (BLACK, (200, 200, 200))),
        (halves("I", -5, 70000), (BLACK, WHITE)),
        (halves("F", 0.0, 1.0), (BLACK, WHITE)),
        (halves("F", 0.0, 200.0), (BLACK, (200, 200, 200))),
        (halves("F", float("nan"), float("inf")), (BLACK, WHITE)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)  # fmt: skip
def test_every_mode_looks_as_it_looks(image: Image.Image, expected: tuple[object, object]) -> None:
    assert colours(image) == expected


def test_a_transparent_palette_entry_shows_white() -> None:
    image = saved(palette(RED, BLUE), "PNG", transparency=1)
    assert image.mode == "P" and colours(image) == (RED, WHITE)
    image = saved(palette(RED, BLUE), "GIF", transparency=1)
    assert colours(image) == (RED, WHITE)


def test_a_transparent_colour_key_shows_white() -> None:
    image = saved(halves("RGB", RED, BLUE), "PNG", transparency=BLUE)
    assert image.mode == "RGB" and colours(image) == (RED, WHITE)
    image = saved(halves("L", 7, 90), "PNG", transparency=7)
    assert colours(image) == (WHITE, (90, 90, 90))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_in_every_mode_is_laid_over_white(mode: str) -> None:
    image = halves("RGBA", (*BLACK, 0), (*BLACK, 255)).convert(mode)
    assert image.mode == mode
    assert colours(image) == (WHITE, BLACK)


def test_a_palette_with_an_alpha_channel_is_laid_over_white() -> None:
    image = Image.new("PA", (4, 2))
    image.putpalette([*RED, *BLUE])
    for x in range(4):
        for y in range(2):
            image.putpixel((x, y), (x // 2, 255 * (x < 2)))
    assert colours(image) == (RED, WHITE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_files_are_scaled_and_not_clipped(kind: str) -> None:
    """PIL's own conversion makes everything above 255 white."""
    values = np.array([[0, 257 * 50, 257 * 51, 65535]] * 2, dtype=np.uint16)
    image = saved(Image.fromarray(values), kind)
    assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [50] * 3, [51] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 2)), (4, (0, 2)), (5, (0, 0)), (6, (2, 0)), (7, (2, 1)),
     (8, (0, 1))],
)  # fmt: skip
def test_exif_turns_the_picture_upright(orientation: int, corner: tuple[int, int]) -> None:
    """Where the stored top left pixel of a 2 x 3 picture is shown."""
    image = Image.new("RGB", (2, 3), BLACK)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = to_rgb(saved(image, "PNG", exif=exif))
    assert upright.size == ((2, 3) if orientation < 5 else (3, 2))
    assert upright.getpixel(corner) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_exif_that_cannot_be_read_is_passed_over(exif: bytes) -> None:
    assert colours(saved(halves("RGB", RED, BLUE), "PNG", exif=exif)) == (RED, BLUE)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (4, 2), colour) for colour in (RED, BLUE, WHITE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    image = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert getattr(image, "n_frames", 1) == 3
    assert colours(image) == (RED, RED)
    image.seek(2)
    assert colours(image) == (RED, RED), "wherever the sender's library had left it"


def test_the_callers_picture_is_left_as_it_was() -> None:
    image = halves("RGBA", (*RED, 255), (*BLUE, 0))
    before = image.tobytes()
    to_rgb(image)
    assert image.mode == "RGBA" and image.tobytes() == before


MAKERS: dict[str, Callable[[int, int], Image.Image]] = {
    mode: lambda width, height, mode=mode: Image.new(mode, (width, height))  # type: ignore[misc]
    for mode in (
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "LA",
        "I;16",
    )
}


@given(st.sampled_from(sorted(MAKERS)), st.integers(1, 9), st.integers(1, 9))
def test_every_mode_and_size_becomes_rgb(mode: str, width: int, height: int) -> None:
    rgb = to_rgb(MAKERS[mode](width, height))
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))


def test_a_picture_that_is_as_it_should_be_is_not_copied() -> None:
    """A copy would double the memory of the largest ones."""
    image = halves("RGB", RED, BLUE)
    assert to_rgb(image) is image
    exif = Image.Exif()
    exif[0x0112] = 1
    upright = saved(image, "PNG", exif=exif)
    assert to_rgb(upright) is upright
