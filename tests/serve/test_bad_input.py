"""Every kind of bad request gets a clear error record, and costs nobody else anything."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from models.demo import simple_scene
from tests.serve.worker import Worker, base64_of, prompt_of

GOOD = base64_of(simple_scene("blue", "square"))
PROMPT = prompt_of("What?")


def png_header(width: int, height: int) -> str:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))
    import base64

    return base64.b64encode(png + chunk(b"IEND", b"")).decode()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"images": []}, "prompt"),
    "prompt is a number": ({"prompt": 3}, "prompt"),
    "empty prompt without a picture": ({"prompt": None}, "prompt"),
    "image is not base64": ({"prompt": PROMPT, "images": ["!!! no base64 !!!"]}, "images[0]"),
    "image is a path": ({"prompt": PROMPT, "images": ["/etc/passwd"]}, "images[0]"),
    "image is a URL": ({"prompt": PROMPT, "images": ["http://127.0.0.1/x.png"]}, "images[0]"),
    "image is not a picture": ({"prompt": PROMPT, "images": ["aGVsbG8gd29ybGQ="]}, "images[0]"),
    "image is cut off": ({"prompt": PROMPT, "images": [GOOD[: len(GOOD) // 8 * 4]]}, "images[0]"),
    "image is a number": ({"prompt": PROMPT, "images": [5]}, "images[0]"),
    "images is a string": ({"prompt": PROMPT, "images": GOOD}, "images"),
    "20000 x 20000 pixels": ({"prompt": PROMPT, "images": [png_header(20000, 20000)]}, "images[0]"),
    "more pictures than places": ({"prompt": PROMPT, "images": [GOOD, GOOD]}, "images"),
    "fewer pictures than places": ({"prompt": prompt_of("?", 2), "images": [GOOD]}, "images"),
    "a place and no pictures": ({"prompt": PROMPT}, "images"),
    "beyond the context": (
        {"prompt": PROMPT + " word" * 5000, "images": [GOOD]}, "prompt",
    ),
    "max_new_tokens negative": ({"prompt": "Hi", "max_new_tokens": -1}, "max_new_tokens"),
    "max_new_tokens beyond all measure": ({"prompt": "Hi", "max_new_tokens": 10**30}, "max_new"),
    "max_new_tokens a string": ({"prompt": "Hi", "max_new_tokens": "64"}, "max_new_tokens"),
    "temperature negative": ({"prompt": "Hi", "temperature": -0.5}, "temperature"),
    "temperature a string": ({"prompt": "Hi", "temperature": "hot"}, "temperature"),
    "top_p above one": ({"prompt": "Hi", "top_p": 1.5}, "top_p"),
    "stop is a number": ({"prompt": "Hi", "stop": 5}, "stop"),
    "stop token beyond the vocabulary": ({"prompt": "Hi", "stop_token_ids": [10**9]}, "stop_token"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def goes_on(tiny: Worker) -> Iterator[None]:
    """After each test the worker is empty, has lost no block, and answers."""
    yield
    tiny.wait_until_empty()
    record = tiny.last(prompt=PROMPT, images=[GOOD], max_new_tokens=2)
    assert record["error_code"] == 0


@pytest.mark.parametrize("name", BAD)
def test_the_error_names_the_field(tiny: Worker, name: str) -> None:
    body, field = BAD[name]
    records = tiny.records(body)
    assert records[-1]["error_code"] == 1
    assert records[-1]["error_type"] == "invalid_request"
    assert field in records[-1]["text"]
    assert "0x" not in records[-1]["text"]
    assert "Traceback" not in records[-1]["text"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"not json", b"[1, 2]", b'"text"', b"null", b"[" * 100_000, b"\xff\xfe\0"],
    ids=["empty", "text", "list", "string", "null", "deep", "bytes"],
)
def test_a_body_that_is_no_json_object_is_refused(tiny: Worker, raw: bytes) -> None:
    (record,) = tiny.records(raw)
    assert record["error_code"] == 1
    assert "body" in record["text"]


def test_temperature_nan_is_refused(tiny: Worker) -> None:
    (*_, record) = tiny.records(b'{"prompt": "Hi", "temperature": NaN}')
    assert record["error_code"] == 1
    assert "temperature" in record["text"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_hundred_megabytes_are_refused(tiny: Worker, announced: bool) -> None:
    total, part = 100 << 20, b"x" * (1 << 20)

    def parts() -> Iterator[bytes]:
        for _ in range(total // len(part)):
            yield part

    (record,) = tiny.records(b"x" * total if announced else parts())
    assert record["error_code"] == 1
    assert "larger than" in record["text"]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 3)])
def test_tiny_and_thin_pictures_are_answered(tiny: Worker, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    assert tiny.last(prompt=PROMPT, images=[base64_of(image)], max_new_tokens=3)["error_code"] == 0


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "I;16", "CMYK"])
def test_pictures_of_every_mode_are_answered(tiny: Worker, mode: str) -> None:
    image = simple_scene("green", "star").convert("L" if mode == "I;16" else mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        image = image.convert("I;16")
    record = tiny.last(prompt=PROMPT, images=[base64_of(image, kind)], max_new_tokens=3)
    assert record["error_code"] == 0


def test_of_an_animation_the_first_picture_is_seen(tiny: Worker) -> None:
    frames = [simple_scene(colour, "circle") for colour in ("red", "blue", "green")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    import base64

    encoded = base64.b64encode(file.getvalue()).decode()
    still = io.BytesIO()
    frames[0].save(still, "GIF")
    expected = tiny.last(
        prompt=PROMPT, images=[base64.b64encode(still.getvalue()).decode()],
        max_new_tokens=8, temperature=0,
    )  # fmt: skip
    seen = tiny.last(prompt=PROMPT, images=[encoded], max_new_tokens=8, temperature=0)
    assert seen["error_code"] == 0
    assert seen["text"] == expected["text"]


def test_bad_requests_do_not_disturb_a_running_answer(tiny: Worker) -> None:
    request = {
        "prompt": PROMPT, "images": [GOOD], "temperature": 0, "max_new_tokens": 400,
        "ignore_eos": True,
    }  # fmt: skip
    expected = tiny.last(**request)["text"]
    with tiny.stream(**request) as records:
        record = next(records)
        for body, _ in BAD.values():
            assert tiny.records(body)[-1]["error_code"] == 1
        *_, record = records
    assert record["text"] == expected
