"""Tiles are those of transformers' LLaVA-NeXT processor, and so is the number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

from models.checkpoints import PreprocessingSpec
from models.checkpoints.spec import PatchMerge
from models.checkpoints.synthesis.configs import CLIP_MEAN, CLIP_STD
from models.vision import ImagePreprocessor, PreparedImage
from models.vision.anyres import TileGrid, choose_pinpoint

MEAN, STD = (CLIP_MEAN[0], CLIP_MEAN[1], CLIP_MEAN[2]), (CLIP_STD[0], CLIP_STD[1], CLIP_STD[2])
TINY = PreprocessingSpec(
    "anyres", "shortest_edge", 32, 32, MEAN, STD,
    grid_pinpoints=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)),
)  # fmt: skip
LARGE = replace(
    TINY, size=336, crop_size=336,
    grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)  # fmt: skip
SIGLIP = replace(
    TINY, resize="square", size=28, crop_size=28, mean=(0.5,) * 3, std=(0.5,) * 3,
    grid_pinpoints=((28, 28), (56, 28), (28, 84), (84, 84)),
)  # fmt: skip
SIZES = [
    (1, 1), (1, 2), (2, 1), (5, 3), (32, 32), (33, 31), (32, 64), (64, 64), (65, 64), (640, 480),
    (480, 640), (300, 100), (100, 300), (301, 100), (90, 31), (400, 3), (3, 400), (1500, 2),
    (2, 1500), (96, 32), (97, 33), (123, 457),
]  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepare(
    image: Image.Image,
    spec: PreprocessingSpec = TINY,
    tokens: int = 16,
    merge: PatchMerge = "spatial_unpad",
) -> PreparedImage:
    return ImagePreprocessor(spec, tokens, merge)(image)


def reference(spec: PreprocessingSpec) -> LlavaNextImageProcessorPil:
    side = {"height": spec.crop_size, "width": spec.crop_size}
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": spec.size} if spec.resize == "shortest_edge" else side,
        crop_size=side, image_mean=list(spec.mean), image_std=list(spec.std),
        resample=spec.resample,
        image_grid_pinpoints=[[height, width] for width, height in spec.grid_pinpoints],
    )  # fmt: skip


def assert_as_in_transformers(image: Image.Image, spec: PreprocessingSpec) -> None:
    expected = reference(spec)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(prepare(image, spec).pixel_values, expected.half().float())


def count_in_transformers(
    size: tuple[int, int], spec: PreprocessingSpec, tokens_per_side: int
) -> int:
    """As LLaVA-NeXT's processor counts, of a tower whose class token is left out."""
    processor = object.__new__(LlavaNextProcessor)  # counting needs no tokenizer
    processor.image_processor = reference(spec)
    processor.patch_size = spec.crop_size // tokens_per_side
    processor.num_additional_image_tokens = 0
    side = spec.crop_size
    return int(processor._get_number_of_features(size[1], size[0], side, side))


# ---- pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [TINY, SIGLIP, replace(TINY, size=37), replace(TINY, resample=2)],
    ids=["clip", "siglip", "with a crop", "another filter"],
)
def test_tiles_are_those_of_transformers(size: tuple[int, int], spec: PreprocessingSpec) -> None:
    assert_as_in_transformers(noise(*size), spec)


@given(st.integers(1, 150), st.integers(1, 150))
def test_tiles_of_any_size_are_those_of_transformers(width: int, height: int) -> None:
    assert_as_in_transformers(noise(width, height), TINY)


@pytest.mark.parametrize("size", [(640, 480), (300, 900)], ids=str)
def test_tiles_of_the_released_models_resolution(size: tuple[int, int]) -> None:
    assert_as_in_transformers(noise(*size), LARGE)


def test_the_whole_picture_comes_first_and_then_the_tiles_row_by_row() -> None:
    """In whole multiples of the tile nothing is resampled but the whole."""
    image = noise(64, 64)
    whole, *tiles = prepare(image).pixel_values
    plain = ImagePreprocessor(replace(TINY, mode="default", grid_pinpoints=()), 16)
    boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    assert len(tiles) == 4
    assert torch.equal(whole, plain(image).pixel_values[0])
    for tile, box in zip(tiles, boxes, strict=True):
        assert torch.equal(tile, plain(image.crop(box)).pixel_values[0])


def test_the_padding_is_black_and_on_both_sides() -> None:
    white = Image.new("RGB", (96, 16), (255, 255, 255))  # fits into 96 x 32
    _, *tiles = prepare(white).pixel_values
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert len(tiles) == 3
    for tile in tiles:
        assert torch.allclose(tile[:, :8], black[:, None, None].expand(3, 8, 32), atol=1e-3)
        assert torch.allclose(tile[:, 24:], black[:, None, None].expand(3, 8, 32), atol=1e-3)
        assert (tile[:, 8:24] > 1.5).all()


# ---- the choice of a resolution -------------------------------------------------------------


def test_llavas_own_pinpoints_are_width_first_and_the_first_of_equals_wins() -> None:
    """A small square shows whole in either; LLaVA lists the tall one first, as it reads it, and
    transformers the wide one, with the same numbers."""
    assert choose_pinpoint((20, 20), TINY.grid_pinpoints) == (32, 64)
    swapped = [(height, width) for width, height in TINY.grid_pinpoints]
    assert choose_pinpoint((20, 20), swapped) == (64, 32)


@pytest.mark.parametrize(
    ("size", "pinpoint"),
    [
        ((640, 480), (672, 672)),
        ((1920, 1080), (672, 672)),
        ((1000, 300), (1008, 336)),
        ((300, 1000), (336, 1008)),
        ((336, 600), (336, 672)),
        ((600, 336), (672, 336)),
        ((20_000, 10), (336, 672)),  # nothing would be left of it in any: the smallest area
    ],
)
def test_the_resolution_that_shows_most_is_chosen(
    size: tuple[int, int], pinpoint: tuple[int, int]
) -> None:
    assert choose_pinpoint(size, LARGE.grid_pinpoints) == pinpoint


# ---- the number of tokens -------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_number_of_tokens_is_transformers(width: int, height: int) -> None:
    for spec, side in ((LARGE, 24), (replace(SIGLIP, size=27, crop_size=27, grid_pinpoints=(
        (27, 27), (81, 27), (27, 54),
    )), 27)):  # fmt: skip
        picture = (width, height)
        pinpoint = choose_pinpoint(picture, spec.grid_pinpoints)
        grid = TileGrid.of(picture, pinpoint, spec.crop_size, side**2)
        expected = count_in_transformers(picture, spec, side)
        assert grid.num_tokens(side**2, "spatial_unpad") == expected


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((672, 672), 576 + 48 * 49),
        ((640, 480), 576 + 36 * 49),
        ((1920, 1080), 576 + 28 * 49),
        ((1008, 336), 576 + 24 * 73),
        ((336, 1008), 576 + 72 * 25),
        ((20_000, 10), 576),  # no row of the tiles shows more than padding
        ((10, 20_000), 576 + 48),  # no column does; the rows are still ended
    ],
)
def test_the_number_of_tokens_of_llava_1_6(size: tuple[int, int], tokens: int) -> None:
    prepared = prepare(Image.new("RGB", size), LARGE, 576)
    assert prepared.num_tokens == tokens == count_in_transformers(size, LARGE, 24)


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_without_unpadding_every_tile_counts(merge: PatchMerge) -> None:
    assert prepare(noise(64, 64), merge=merge).num_tokens == 5 * 16
    assert prepare(noise(96, 10), merge=merge).num_tokens == 4 * 16


def llavas_rows_and_columns(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """What LLaVA's own code leaves of a plane of tokens, whose fractions it cuts off as floats."""
    if size[0] / size[1] > width / height:
        padding = (height - int(size[1] * (width / size[0]))) // 2
        return height - 2 * padding, width
    padding = (width - int(size[0] * (height / size[1]))) // 2
    return height, width - 2 * padding


@given(st.integers(1, 1500), st.integers(1, 1500))
def test_llavas_own_rounding_loses_at_most_two_rows(width: int, height: int) -> None:
    grid = TileGrid.of((width, height), (672, 672), 336, 576)
    ours = (48 - 2 * grid.blank_rows, 48 - 2 * grid.blank_columns)
    theirs = llavas_rows_and_columns((width, height), 48, 48)
    exact = height * 48 % width == 0 or width * 48 % height == 0
    assert ours == theirs or (exact and sum(ours) - sum(theirs) == 2)


def test_llavas_own_rounding_differs_for_few_pictures() -> None:
    """1056 x 220 in 1008 x 336 is 15 rows exactly, and 14.999999999999998 in floats."""
    grid = TileGrid.of((1056, 220), (1008, 336), 336, 576)
    assert 24 - 2 * grid.blank_rows == 16
    assert llavas_rows_and_columns((1056, 220), 24, 72) == (14, 72)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize(("spec", "tokens"), [(TINY, 16), (SIGLIP, 49), (LARGE, 576)])
def test_no_picture_has_fewer_tokens_than_the_minimum(
    spec: PreprocessingSpec, tokens: int, merge: PatchMerge
) -> None:
    preprocess = ImagePreprocessor(spec, tokens, merge)
    sizes = [*SIZES, (20_000, 1), (1, 20_000), (5000, 4), (4, 5000)]
    counts = []
    for size in sizes:
        pinpoint = choose_pinpoint(size, spec.grid_pinpoints)
        grid = TileGrid.of(size, pinpoint, spec.crop_size, tokens)
        counts.append(grid.num_tokens(tokens, merge))
    assert min(counts) >= preprocess.min_tokens
    if tokens != 49:  # an odd plane's least is that of a resolution that no such picture takes
        assert min(counts) == preprocess.min_tokens
    assert ImagePreprocessor(replace(spec, mode="pad"), tokens).min_tokens == tokens


# ---- hostile pictures -----------------------------------------------------------------------


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the process grows while it works."""

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    work()
    return peak() - before


@pytest.mark.parametrize(
    "size", [(20_000, 10), (10, 20_000), (1, 1), (4096, 4096), (60_000, 1)], ids=str
)
def test_hostile_pictures_take_little_memory_and_few_tokens(size: tuple[int, int]) -> None:
    """A square of 20,000 pixels' side would take 1.2 GB; the largest canvas here takes 1.4 MB, and
    the pixels of five tiles 7 MB, a few times over."""
    image = Image.new("RGB", size, (200, 10, 10))
    preprocess = ImagePreprocessor(LARGE, 576, "spatial_unpad")
    prepared: list[PreparedImage] = []
    grown = peak_growth(lambda: prepared.append(preprocess(image)))
    assert grown < 64 << 20
    assert prepared[0].pixel_values.shape[0] <= 5
    assert prepared[0].pixel_values.isfinite().all()
    assert 576 <= prepared[0].num_tokens <= 576 + 48 * 49


# ---- identity -------------------------------------------------------------------------------


def test_the_digest_tells_apart_what_becomes_other_tokens() -> None:
    image = noise(64, 64)
    black = [Image.new("RGB", size) for size in ((96, 32), (96, 16), (64, 64), (64, 48))]
    digests = [
        prepare(image).digest, prepare(image, merge="flat").digest,
        prepare(image, merge="spatial").digest,
        prepare(image, replace(TINY, mode="default", grid_pinpoints=())).digest,
        *(prepare(picture).digest for picture in black),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    # Padded with black, these two are the same pixels, and not the same tokens.
    wide, thin = (prepare(picture) for picture in black[:2])
    assert torch.equal(wide.pixel_values, thin.pixel_values)
    assert wide.num_tokens != thin.num_tokens
    assert prepare(image).digest == prepare(image.copy()).digest
