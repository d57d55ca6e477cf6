"""Pixels are those of transformers' own processors, and pad is LLaVA's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from models.checkpoints import PreprocessingSpec
from models.checkpoints.synthesis.configs import CLIP_MEAN, CLIP_STD
from models.vision import ImagePreprocessor

CLIP = PreprocessingSpec(
    "default",
    "shortest_edge",
    32,
    32,
    (CLIP_MEAN[0], CLIP_MEAN[1], CLIP_MEAN[2]),
    (CLIP_STD[0], CLIP_STD[1], CLIP_STD[2]),
)
SIGLIP = PreprocessingSpec("default", "square", 28, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(32, 32), (40, 30), (30, 41), (200, 50), (33, 100), (7, 5), (640, 480), (31, 33)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((width, height, seed))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(spec: PreprocessingSpec, image: Image.Image) -> Tensor:
    prepared = ImagePreprocessor(spec, 16)(image)
    assert prepared.num_tokens == 16 and prepared.pixel_values.dtype == torch.float32
    (tile,) = prepared.pixel_values
    return tile


def clip(image: Image.Image, size: int = 32, crop: int = 32) -> Tensor:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}
    )
    out: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return out


def siglip(image: Image.Image, size: int = 28) -> Tensor:
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    out: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return out


def expand2square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """LLaVA's `llava/mm_utils.py`, word for word."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), color)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), color)
    result.paste(image, ((height - width) // 2, 0))
    return result


def assert_rounded(got: Tensor, expected: Tensor) -> None:
    """The same numbers, as fp16 holds them: the original hands the tower half precision."""
    assert torch.equal(got, expected.half().float())


# ---- against transformers -------------------------------------------------------------------


@every_size
def test_default_is_clips_processor(size: tuple[int, int]) -> None:
    assert_rounded(pixels(CLIP, noise(*size)), clip(noise(*size)))


@every_size
def test_default_with_a_larger_resize_is_clips_processor(size: tuple[int, int]) -> None:
    spec = replace(CLIP, size=37, crop_size=32)
    assert_rounded(pixels(spec, noise(*size)), clip(noise(*size), size=37))


@every_size
def test_default_is_siglips_processor(size: tuple[int, int]) -> None:
    assert_rounded(pixels(SIGLIP, noise(*size)), siglip(noise(*size)))


@every_size
def test_pad_is_llavas_square_in_clips_processor(size: tuple[int, int]) -> None:
    square = expand2square(noise(*size), tuple(int(x * 255) for x in CLIP_MEAN))  # type: ignore[arg-type]
    assert_rounded(pixels(replace(CLIP, mode="pad"), noise(*size)), clip(square))


@every_size
def test_pad_is_llavas_square_in_siglips_processor(size: tuple[int, int]) -> None:
    square = expand2square(noise(*size), (127, 127, 127))
    assert_rounded(pixels(replace(SIGLIP, mode="pad"), noise(*size)), siglip(square))


@every_size
def test_resize_is_a_plain_resize_before_the_processor(size: tuple[int, int]) -> None:
    """VILA: `image.resize((crop, crop))`, whose default is bicubic, then the processor."""
    resized = noise(*size).resize((28, 28), Image.Resampling.BICUBIC)
    assert_rounded(pixels(replace(SIGLIP, mode="resize"), noise(*size)), siglip(resized))
    resized = noise(*size).resize((32, 32), Image.Resampling.BICUBIC)
    assert_rounded(pixels(replace(CLIP, mode="resize"), noise(*size)), clip(resized))


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["pad", "resize", "default"]))
def test_any_size_in_any_mode_is_as_in_transformers(width: int, height: int, mode: str) -> None:
    image = noise(width, height)
    before = {
        "pad": lambda im: expand2square(im, tuple(int(x * 255) for x in CLIP_MEAN)),  # type: ignore[arg-type]
        "resize": lambda im: im.resize((32, 32), Image.Resampling.BICUBIC),
        "default": lambda im: im,
    }[mode](image)
    assert_rounded(pixels(replace(CLIP, mode=mode), image), clip(before))


def test_other_filters_and_scales_are_honoured() -> None:
    image = noise(60, 45)
    got = pixels(replace(SIGLIP, resample=2, rescale_factor=1 / 127.5), image)
    processor = SiglipImageProcessorPil(
        size={"height": 28, "width": 28}, resample=2, rescale_factor=1 / 127.5
    )
    assert_rounded(got, processor(image, return_tensors="pt")["pixel_values"][0])
    assert not torch.equal(got, pixels(SIGLIP, image))


def test_the_pad_is_of_the_mean_colour_and_centred() -> None:
    white = Image.new("RGB", (32, 16), (255, 255, 255))
    got = pixels(replace(CLIP, mode="pad"), white)
    # The resize is one to one, so rows are exact; int() makes the mean's colour a little darker.
    assert (got[:, :8].abs() < 0.02).all() and (got[:, 24:].abs() < 0.02).all()
    assert (got[:, 8:24] > 1.5).all()


# ---- thin, small and large ------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (3, 3), (1, 500), (500, 1)]
)
@pytest.mark.parametrize("spec", [CLIP, SIGLIP])
@pytest.mark.parametrize("mode", ["pad", "resize", "default"])
def test_the_thinnest_pictures_have_pixels(
    size: tuple[int, int], spec: PreprocessingSpec, mode: str
) -> None:
    got = pixels(replace(spec, mode=mode), noise(*size))
    assert got.shape == (3, spec.crop_size, spec.crop_size) and got.isfinite().all()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (30_000, 3)])
@pytest.mark.parametrize("mode", ["pad", "default"])
def test_a_long_strip_takes_no_memory_by_the_square_of_its_length(
    size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded naively, 20,000 pixels of length would be a canvas of 1.2 GB."""
    largest = 0
    for name in ("new", "Image.resize"):
        owner: object = Image.Image if "." in name else Image
        made: Callable[..., Image.Image] = getattr(owner, name.rpartition(".")[2])

        def watched(
            *args: object, made: Callable[..., Image.Image] = made, **kw: object
        ) -> Image.Image:
            nonlocal largest
            image = made(*args, **kw)
            largest = max(largest, image.width * image.height)
            return image

        monkeypatch.setattr(owner, name.rpartition(".")[2], watched)
    image = Image.new("RGB", size, (200, 10, 10))
    largest = 0
    got = pixels(replace(CLIP, mode=mode), image)
    assert largest <= 4096 * 4096
    if mode == "default":  # the middle of a plain strip is plain
        assert torch.allclose(
            got, pixels(CLIP, Image.new("RGB", (32, 32), (200, 10, 10))), atol=2e-3
        )


def test_the_shortcut_for_strips_is_the_long_way_at_its_limit() -> None:
    """4097 pixels go by the crop inside the resize; the same strip without its ends goes whole."""
    image = noise(129, 1).resize((32 * 129, 32), Image.Resampling.NEAREST)  # longest edge 4128
    middle = image.crop((32, 0, 32 * 128, 32))
    assert torch.allclose(pixels(CLIP, image), pixels(CLIP, middle), atol=0.02)


# ---- identity -------------------------------------------------------------------------------


def test_the_digest_is_of_what_the_tower_sees_and_how_it_came_to_be() -> None:
    image = noise(40, 30)

    def digest(spec: PreprocessingSpec, image: Image.Image, tokens: int = 16) -> bytes:
        return ImagePreprocessor(spec, tokens)(image).digest

    assert digest(CLIP, image) == digest(CLIP, image.copy())
    assert digest(CLIP, image) == digest(CLIP, image.convert("RGBA"))
    different = {
        digest(CLIP, image), digest(CLIP, noise(40, 30, seed=1)), digest(SIGLIP, image),
        digest(replace(CLIP, mode="pad"), image), digest(CLIP, image, 8),
        digest(CLIP, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }  # fmt: skip
    assert len(different) == 6


def test_the_same_bytes_in_another_shape_are_another_picture() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 40 * 30 * 3, dtype=np.uint8)
    wide, tall = (Image.fromarray(raw.reshape(shape)) for shape in ((30, 40, 3), (40, 30, 3)))
    assert wide.tobytes() == tall.tobytes()
    preprocess = ImagePreprocessor(CLIP, 16)
    assert preprocess(wide).digest != preprocess(tall).digest


def test_pictures_are_prepared_in_several_threads_at_once() -> None:
    preprocess = ImagePreprocessor(replace(CLIP, mode="pad"), 16)
    images = [noise(30 + i, 50, seed=i) for i in range(24)]
    expected = [preprocess(image).digest for image in images]
    fresh = ImagePreprocessor(replace(CLIP, mode="pad"), 16)
    with ThreadPoolExecutor(8) as pool:
        assert [p.digest for p in pool.map(fresh, images)] == expected
