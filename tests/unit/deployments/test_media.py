"""Pictures: every spelling of base64, every kind of picture, and everything that is neither."""

from __future__ import annotations

import base64
import builtins
import io
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deployments.media import ImageLimits, decode_images
from models.errors import InvalidRequest
from tests.unit.deployments.harness import encoded, outcome

LIMITS = ImageLimits(
    max_bytes=1 << 20, max_pixels=1_000_000, max_side=2000, max_request_pixels=1_500_000
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what PIL thinks of damaged notes
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


def decode(text: str, limits: ImageLimits = LIMITS) -> Image.Image:
    (image,) = decode_images([text], limits)
    assert image.mode == "RGB"
    image.load()
    return image


def refusal(text: str, limits: ImageLimits = LIMITS) -> str:
    """The message: about the picture that was meant, and nothing that only we should know."""
    with pytest.raises(InvalidRequest) as caught:
        decode_images([text], limits)
    message = str(caught.value)
    assert caught.value.field == "images[0]"
    assert "0x" not in message
    assert "/" not in message.replace("image/", "")
    assert len(message) < 300
    return message


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return found


def half_and_half(width: int = 8, height: int = 4) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def raw(text: str) -> bytes:
    return base64.b64decode(text)


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large, in a few bytes."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"\0" * 100)),
            (b"IEND", b""),
        ]
    )


class TestBase64:
    text = encoded(half_and_half())

    def wrapped(self) -> str:
        return base64.encodebytes(raw(self.text)).decode("ascii")

    def test_bare_base64_is_what_the_protocol_sends(self) -> None:
        assert decode(self.text).tobytes() == half_and_half().tobytes()

    @pytest.mark.parametrize("format", FORMATS)
    def test_all_usual_formats_are_read(self, format: str) -> None:
        image = decode(encoded(half_and_half(32, 16), format))
        assert image.size == (32, 16)
        assert np.allclose(pixel(image), RED, atol=12)
        assert np.allclose(pixel(image, 31, 15), BLUE, atol=12)

    def test_a_phones_picture_of_many_is_read_as_its_first(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
        text = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
        assert np.allclose(pixel(decode(text)), RED, atol=12)

    @pytest.mark.parametrize(
        "head",
        [
            "data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:image/jpeg;base64,",
            "data:;base64,", "data:image/png;charset=utf-8;base64,", " data:image/png;base64, ",
            "data:application/octet-stream;base64,", "data:image/svg+xml;base64,",
        ],
    )  # fmt: skip
    def test_a_data_url_is_read_by_its_bytes(self, head: str) -> None:
        assert decode(head + self.text) == decode(self.text)

    @pytest.mark.parametrize("length", [0, 1, 2])
    def test_padding_may_be_missing_or_too_much(self, length: int) -> None:
        data = raw(encoded(half_and_half(), "BMP"))
        text = as_base64(data + b"\0" * ((length - len(data)) % 3))
        for spelling in (text, text.rstrip("="), text + "=", text + "\n"):
            assert decode(spelling).size == (8, 4)

    def test_line_breaks_and_blanks_are_passed_over(self) -> None:
        for spelling in (self.wrapped(), self.wrapped().replace("\n", "\r\n"), f" {self.text}\t\n"):
            assert decode(spelling) == decode(self.text)

    def test_the_url_safe_alphabet_is_read_too(self) -> None:
        noise = Image.frombytes("RGB", (16, 16), random.Random(0).randbytes(768))
        usual = encoded(noise, "BMP")
        assert "+" in usual
        assert "/" in usual
        assert decode(usual.replace("+", "-").replace("/", "_")).tobytes() == noise.tobytes()

    @pytest.mark.parametrize("text", ["", " ", "\n", "=", "====", "data:image/png;base64,"])
    def test_nothing_is_no_picture(self, text: str) -> None:
        assert "is empty" in refusal(text)

    @pytest.mark.parametrize(
        "text",
        [
            "a picture of a cat!", "QUJD?", "QU=JD", "QUJDR", "猫", "QUJD猫", "ＱＵＪＤ", "\0",
            "QU\0JD", "data:image/png;base64", "data:image/png;base64;QUJD", "\ud83d",
        ],
    )  # fmt: skip
    def test_what_is_not_base64_is_told_apart(self, text: str) -> None:
        assert "not base64" in refusal(text)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("data:image/png,QUJD", "not base64"),
            ("data:,QUJD", "not base64"),
            ("data:image/png;utf8,QUJD", "not base64"),
            ("data:text/html;base64,QUJD", "'text/html'"),
            ("data:video/jpeg;base64,QUJD", "'video/jpeg'"),
        ],
    )
    def test_other_data_urls_are_refused(self, text: str, why: str) -> None:
        with pytest.raises(InvalidRequest, match=why):
            decode_images([text], LIMITS)

    @pytest.mark.parametrize("filler", [";", ";a", "a", " ", "a;", ";="])
    def test_a_long_prefix_costs_nothing(self, filler: str) -> None:
        """To search for the comma over megabytes of ";" would take seconds and gigabytes."""
        text = "data:" + filler * (3_000_000 // len(filler))
        started = time.process_time()
        refusal(text, replace(LIMITS, max_bytes=10 << 20))
        assert time.process_time() - started < 1


class TestNothingButPictures:
    @pytest.mark.parametrize(
        "url",
        [
            "http://192.0.2.1/cat.png", "https://example.com/cat.png", "HTTP://EXAMPLE.COM",
            " http://127.0.0.1:21001/", "file:///etc/passwd", "ftp://192.0.2.1/a",
            "gopher://127.0.0.1:6379/_SET", "s3://bucket/key", "http://good\\@evil/",
        ],
    )  # fmt: skip
    def test_a_url_is_refused_and_never_fetched(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(*args: object, **kwargs: object) -> Any:
            raise AssertionError("the network was touched")

        for name in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, forbidden)
        assert "fetches none" in refusal(url)

    @pytest.mark.parametrize("spelling", ["{}", "file://{}", "file:{}", "data:image/png,{}"])
    def test_a_path_is_never_opened(
        self, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "AAAA"  # whose letters are base64, every one of them
        path.write_bytes(raw(TestBase64.text))
        opened: list[object] = []

        def watched(real: Any) -> Any:
            def wrapper(file: Any, *args: Any, **kwargs: Any) -> Any:
                opened.append(file)
                return real(file, *args, **kwargs)

            return wrapper

        decode(TestBase64.text)  # what imports of its own it has are done with
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", watched(builtins.open))
            patch.setattr(io, "open", watched(io.open))
            patch.setattr(os, "open", watched(os.open))
            refusal(spelling.format(path))
            refusal(spelling.format("/etc/passwd"))
        assert opened == []

    @pytest.mark.parametrize(
        "data",
        [
            b"plain text",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # PIL would start Ghostscript
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.4",
            b"\0" * 64,
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"RIFF\0\0\0\0WEBP",
            b"BM",
            b"II*\0\x08\0\0\0",
            b"P6 1 1 255",
            pytest.param(b"P6 " + b"9" * 6000 + b" 1 255 ", id="digits"),
        ],
    )
    def test_other_files_are_refused(self, data: bytes) -> None:
        refusal(as_base64(data))

    def test_a_format_that_was_not_asked_for_is_not_tried(self) -> None:
        assert "known format" in refusal(encoded(half_and_half(), "ICO"))
        assert "known format" in refusal(encoded(half_and_half(), "EPS"))

    def test_the_picture_that_is_wrong_is_named(self) -> None:
        good = TestBase64.text
        for index in range(3):
            images = [good, good, good]
            images[index] = "QUJD"
            with pytest.raises(InvalidRequest) as caught:
                decode_images(images, LIMITS)
            assert caught.value.field == f"images[{index}]"


class TestLimits:
    @pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (1, 2000), (2000, 1)])
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
    def test_the_smallest_and_thinnest_pictures_are_read(
        self, size: tuple[int, int], format: str
    ) -> None:
        assert decode(encoded(Image.new("RGB", size, RED), format)).size == size

    @pytest.mark.parametrize(
        ("width", "height"),
        [(20_000, 20_000), (2001, 1), (1, 2001), (1001, 1000), (60_000, 60_000), (1 << 31, 1)],
    )
    def test_too_many_pixels_are_refused_by_the_header(
        self, width: int, height: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(self: object) -> Any:
            raise AssertionError("pixels were decoded")

        from PIL import ImageFile

        monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
        assert "at most 1000000 pixels and 2000 on a side" in refusal(
            as_base64(png_header(width, height))
        )

    @pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
    def test_a_picture_without_pixels_is_refused(self, width: int, height: int) -> None:
        refusal(as_base64(png_header(width, height)))

    def test_a_gif_whose_first_frame_is_larger_than_its_screen_says_is_measured(self) -> None:
        data = bytearray(raw(encoded(Image.new("P", (4, 4)), "GIF")))
        frame = data.index(b"\x2c") + 1  # the image descriptor: left, top, width, height
        struct.pack_into("<HHHH", data, frame, 0, 0, 60_000, 60_000)
        assert "on a side" in refusal(as_base64(bytes(data)))

    def test_pictures_that_are_each_small_enough_are_counted_together(self) -> None:
        image = encoded(Image.new("1", (1000, 500)))
        assert len(decode_images([image] * 3, LIMITS)) == 3
        with pytest.raises(InvalidRequest, match="2000000 pixels in all pictures") as caught:
            decode_images([image] * 4, LIMITS)
        assert caught.value.field == "images"

    def test_none_is_decoded_before_all_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = as_base64(png_header(1000, 1000))  # would fail, if it came to that
        with pytest.raises(InvalidRequest, match="in all pictures"):
            decode_images([broken] * 2, LIMITS)

    def test_bytes_are_counted_as_they_are_in_the_file(self) -> None:
        data = raw(encoded(half_and_half(), "BMP"))
        exact = replace(LIMITS, max_bytes=len(data))
        assert decode(as_base64(data), exact).size == (8, 4)
        assert decode(base64.encodebytes(data).decode("ascii"), exact).size == (8, 4)
        assert "larger than" in refusal(as_base64(data), replace(LIMITS, max_bytes=len(data) - 1))
        assert "larger than" in refusal("A" * 2_000_000)
        assert "larger than" in refusal("\n" * 2_000_000)

    def test_a_file_that_swells_when_unpacked_is_refused(self) -> None:
        """A megabyte of text in a comment of a few kilobytes, a thousand times."""
        chunk = b"zTXt" + b"note\0\0" + zlib.compress(b"x" * (1 << 20))
        packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = png_header(4, 4)
        start = data.index(b"IDAT") - 4
        refusal(as_base64(data[:start] + packed * 500 + data[start:]))


class TestRendering:
    def test_a_palette_is_looked_up(self) -> None:
        palette = half_and_half().convert("P", palette=Image.Palette.ADAPTIVE)
        assert decode(encoded(palette)).tobytes() == half_and_half().tobytes()

    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
    def test_what_is_transparent_is_white(self, format: str) -> None:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (*RED, 255))
        shown = decode(encoded(image, format, **({"lossless": True} if format == "WEBP" else {})))
        assert (pixel(shown), pixel(shown, 1)) == (WHITE, RED)

    def test_what_is_half_transparent_is_mixed_with_white(self) -> None:
        shown = decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
        assert np.allclose(pixel(shown), 127, atol=1)
        assert np.allclose(pixel(decode(encoded(Image.new("LA", (1, 1), (0, 128))))), 127, atol=1)

    def test_a_transparent_colour_is_white(self) -> None:
        palette = half_and_half().convert("P", palette=Image.Palette.ADAPTIVE)
        (index,) = {palette.getpixel((0, 0))}
        for format in ("PNG", "GIF"):
            shown = decode(encoded(palette, format, transparency=index))
            assert (pixel(shown), pixel(shown, 7)) == (WHITE, BLUE)
        keyed = decode(encoded(half_and_half(), transparency=RED))
        assert (pixel(keyed), pixel(keyed, 7)) == (WHITE, BLUE)

    @pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255), ("LA", (255, 255))])
    def test_grey_is_read(self, mode: str, colour: Any) -> None:
        assert pixel(decode(encoded(Image.new(mode, (2, 2), colour)))) == WHITE

    def test_sixteen_bits_are_scaled_and_not_cut_off(self) -> None:
        values = np.array([[0, 255, 128 * 257, 65535]], dtype=np.uint16)
        shown = decode(encoded(Image.fromarray(values)))
        assert [pixel(shown, x)[0] for x in range(4)] == [0, 1, 128, 255]

    def test_ink_becomes_light(self) -> None:
        for format in ("JPEG", "TIFF"):
            shown = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format))
            assert np.allclose(pixel(shown), RED, atol=12)

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_of_an_animation_the_first_frame_is_shown(self, format: str) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE, WHITE)]
        options: Any = {"lossless": True} if format == "WEBP" else {}
        text = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixel(decode(text)) == RED

    @pytest.mark.parametrize(
        ("orientation", "left_is"),
        [(1, "left"), (2, "right"), (3, "right"), (4, "left"), (5, "top"), (6, "top"),
         (7, "bottom"), (8, "bottom")],
    )  # fmt: skip
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    def test_a_picture_is_turned_as_it_was_held(
        self, orientation: int, left_is: str, format: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = decode(encoded(half_and_half(32, 16), format, exif=exif))
        where = {"left": (0, 0), "right": (31, 0), "top": (0, 0), "bottom": (0, 31)}[left_is]
        assert shown.size == ((32, 16) if left_is in {"left", "right"} else (16, 32))
        assert np.allclose(pixel(shown, *where), RED, atol=12)

    @pytest.mark.parametrize("seed", range(20))
    def test_notes_that_cannot_be_read_do_not_cost_the_picture(self, seed: int) -> None:
        rng = random.Random(seed)
        exif = Image.Exif()
        exif[0x0112] = 6
        notes = bytearray(exif.tobytes())
        for _ in range(3):
            notes[rng.randrange(6, len(notes))] = rng.randrange(256)
        shown = decode(encoded(half_and_half(32, 16), "PNG", exif=bytes(notes)))
        assert sorted(shown.size) == [16, 32]


class TestDamage:
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    def test_a_picture_that_was_cut_off_is_refused(self, format: str) -> None:
        noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
        data = raw(encoded(noise, format))
        for length in range(0, len(data) * 3 // 4, max(1, len(data) // 40)):
            refusal(as_base64(data[:length]))

    def test_a_damaged_picture_is_named_with_its_format(self) -> None:
        data = raw(encoded(half_and_half(64, 64)))
        assert "PNG picture that is damaged" in refusal(as_base64(data[: len(data) // 2]))

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from([*FORMATS, "EXIF"]), st.randoms(use_true_random=False))
    def test_bytes_changed_at_random_are_decoded_or_refused(
        self, format: str, rng: random.Random
    ) -> None:
        options: Any = {}
        if format == "EXIF":
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "a note"
            format, options = "JPEG", {"exif": exif}
        data = bytearray(raw(encoded(half_and_half(16, 16), format, **options)))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        self.decoded_or_refused(as_base64(bytes(data)))

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(
            [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*",
             b"P6 ", b"P4 ", b"Pf ", b"RIFF\x40\0\0\0WEBPVP8L", png_header(5, 5)[:-20]]
        ),
        st.binary(max_size=200),
    )  # fmt: skip
    def test_bytes_at_random_are_decoded_or_refused(self, head: bytes, rest: bytes) -> None:
        self.decoded_or_refused(as_base64(head + rest))

    @settings(max_examples=150)
    @given(st.text(st.characters(codec=None)) | st.text("AZaz09+/=-_ \n:;,data", max_size=50))
    def test_text_at_random_is_refused(self, text: str) -> None:
        self.decoded_or_refused(text)

    def decoded_or_refused(self, text: str) -> None:
        found = outcome(lambda: decode_images([text], LIMITS))
        if isinstance(found, InvalidRequest):
            assert found.field == "images[0]"
        else:
            (image,) = found
            assert image.mode == "RGB"
            assert image.width * image.height <= LIMITS.max_pixels


def test_importing_the_http_side_does_not_load_torch() -> None:
    """The builder and the clients run it too, and torch takes them seconds to load."""
    code = (
        "import sys, deployments.http_app, deployments.media\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


class TestFiles:
    """From Python callers, and from URLs."""

    def test_bytes_are_files_as_they_are(self) -> None:
        first, second = decode_images(
            [raw(encoded(half_and_half())), encoded(half_and_half())], LIMITS
        )
        assert first == second

    def test_their_size_is_bounded_too(self) -> None:
        with pytest.raises(InvalidRequest, match="larger than"):
            decode_images([b"x" * (LIMITS.max_bytes + 1)], LIMITS)

    def test_they_are_called_what_the_caller_calls_them(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            decode_images(
                [encoded(half_and_half()), b"nonsense"], LIMITS, ["the first", "the other"]
            )
        assert caught.value.field == "the other"
