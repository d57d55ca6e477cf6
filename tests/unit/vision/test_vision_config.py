"""Towers and processors are read as transformers saves them, and as LLaVA and VILA do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from models.checkpoints.spec import VisionSpec
from models.checkpoints.vision_config import read_hf_vision, read_vision
from models.errors import CheckpointError
from models.json_config import JsonConfig
from models.vision import ImagePreprocessor
from tests.checkpoint_files import rewrite_json
from tests.tiny import clip_config, siglip_config, write_tiny_llava
from tests.unit.vision.test_anyres import noise

SIDE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [96, 64]]
"""(height, width) to transformers, (width, height) to LLaVA; the last is not symmetric."""

PROCESSORS: dict[str, Any] = {
    "llava": CLIPImageProcessorPil, "llava_next": LlavaNextImageProcessorPil,
    "siglip": SiglipImageProcessorPil,
}  # fmt: skip


def write_hf(folder: Path, kind: str = "llava", **changes: Any) -> Path:
    """config.json and preprocessor_config.json as transformers writes them."""
    folder.mkdir(exist_ok=True)
    if kind == "llava_next":
        config: Any = LlavaNextConfig(vision_config=clip_config(), image_grid_pinpoints=PINPOINTS)
        processor: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS
        )
    elif kind == "siglip":
        config = LlavaConfig(
            vision_config=siglip_config(), vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )  # fmt: skip
        processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    else:
        config = LlavaConfig(vision_config=clip_config())
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    rewrite_json(folder / "config.json", **changes)
    return folder


def read_hf(folder: Path) -> VisionSpec:
    config = JsonConfig.read(folder / "config.json", "config.json")
    return read_hf_vision(folder, model_config=config)


# ---- transformers' layout -------------------------------------------------------------------


def test_a_llava_of_transformers(tmp_path: Path) -> None:
    spec = read_hf(write_hf(tmp_path))
    assert isinstance(spec.config, CLIPVisionConfig)
    expected = clip_config()
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "hidden_act"):
        assert getattr(spec.config, key) == getattr(expected, key)
    assert (spec.select_layer, spec.select_feature) == (-2, "patch")
    assert (spec.preprocessing.mode, spec.preprocessing.resize) == ("default", "shortest_edge")
    assert (spec.preprocessing.size, spec.preprocessing.crop_size) == (32, 32)


def test_a_llava_next_of_transformers_has_pinpoints_height_first(tmp_path: Path) -> None:
    spec = read_hf(write_hf(tmp_path, "llava_next"))
    assert spec.preprocessing.mode == "anyres"
    assert spec.preprocessing.grid_pinpoints == ((64, 32), (32, 64), (64, 96))


def test_a_siglip_in_transformers_layout(tmp_path: Path) -> None:
    spec = read_hf(write_hf(tmp_path, "siglip"))
    assert isinstance(spec.config, SiglipVisionConfig)
    assert (spec.select_layer, spec.select_feature) == (-1, "cls_patch")
    assert (spec.preprocessing.resize, spec.preprocessing.crop_size) == ("square", 28)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "siglip"])
@pytest.mark.parametrize("size", [(50, 30), (20, 200)])
def test_pixels_are_those_of_the_saved_processor(
    kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    spec = read_hf(write_hf(tmp_path, kind)).preprocessing
    processor: Any = PROCESSORS[kind].from_pretrained(tmp_path)
    expected: torch.Tensor = processor(noise(*size), return_tensors="pt")["pixel_values"]
    got = ImagePreprocessor(spec, 16)(noise(*size)).pixel_values
    assert torch.equal(got, expected.reshape(got.shape).half().float())


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40)])
def test_do_pad_is_the_square_of_the_mean_colour(size: tuple[int, int], tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    processor = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE, do_pad=True)
    processor.save_pretrained(folder)
    spec = read_hf(folder).preprocessing
    assert spec.mode == "pad"
    expected = processor(noise(*size), return_tensors="pt")["pixel_values"]
    assert torch.equal(
        ImagePreprocessor(spec, 16)(noise(*size)).pixel_values, expected.half().float()
    )
    # Of any other processor it means that a batch is padded, which is none of ours.
    rewrite_json(folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    assert read_hf(folder).preprocessing.mode == "default"


def test_the_newer_file_holds_the_image_processor_among_others(tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    old = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    newer.write_text(json.dumps({"patch_size": 8, "image_processor": json.loads(old.read_text())}))
    rewrite_json(old, crop_size=None, size=None)
    assert read_hf(folder).preprocessing.crop_size == 32
    newer.write_text(json.dumps({"patch_size": 8}))
    with pytest.raises(CheckpointError, match="^preprocessor_config.json: size is None"):
        read_hf(folder)
    old.unlink()
    with pytest.raises(CheckpointError, match="^preprocessor_config.json cannot be read"):
        read_hf(folder)


def test_short_files_are_filled_up_as_by_transformers(tmp_path: Path) -> None:
    """llava-hf's own config.json leaves out what is CLIP's default."""
    folder = write_hf(tmp_path, vision_feature_layer=None, vision_feature_select_strategy=None)
    config = folder / "config.json"
    vision = json.loads(config.read_text())["vision_config"]
    rewrite_json(config, vision_config={"image_size": 32, "patch_size": vision["patch_size"]})
    spec = read_hf(folder)
    assert isinstance(spec.config, CLIPVisionConfig) and spec.config.hidden_act == "quick_gelu"
    assert (spec.select_layer, spec.select_feature) == (-2, "patch")


def test_absent_pinpoints_are_transformers(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, "llava_next", image_grid_pinpoints=None)
    rewrite_json(folder / "config.json", vision_config={"image_size": 336, "patch_size": 14})
    side = {"height": 336, "width": 336}
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    processor.save_pretrained(folder)
    expected = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
    assert read_hf(folder).preprocessing.grid_pinpoints == expected


@pytest.mark.parametrize("layer", [-2, [-2]])
def test_one_layer_may_be_a_list(layer: object, tmp_path: Path) -> None:
    assert read_hf(write_hf(tmp_path, vision_feature_layer=layer)).select_layer == -2


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer is [-2, -5]; joining"),
        ("llava", {"vision_feature_layer": []}, "vision_feature_layer is []; joining"),
        ("llava", {"vision_feature_layer": -5}, "vision_feature_layer is -5; the tower has 3"),
        ("llava", {"vision_feature_select_strategy": "patch"},
         "unknown vision_feature_select_strategy 'patch'; known: default, full"),
        ("siglip", {"vision_feature_select_strategy": "default"},
         "a siglip_vision_model has no class token to leave out"),
        ("llava", {"vision_config": None}, "config.json lacks 'vision_config'"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "unknown vision tower 'pixtral'"),
        ("llava", {"vision_config": {"image_size": 48}},
         "makes pictures of 32 pixels, but the tower reads 48 (image_size in config.json (vision"),
        ("llava_next", {"image_grid_pinpoints": [[32, 64]]},
         "it must be as in config.json"),
        ("llava_next", {"image_grid_pinpoints": [[32, 48]]}, "multiples of the tile's 32"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_key(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_hf(write_hf(tmp_path, kind, **changes))
    assert message in str(caught.value)


# ---- LLaVA's layout -------------------------------------------------------------------------


def read_flat(folder: Path, **changes: Any) -> VisionSpec:
    write_tiny_llava(folder)
    rewrite_json(folder / "config.json", **changes)
    config = JsonConfig.read(folder / "config.json", "config.json")
    return read_vision(folder / "clip-tiny", folder, model_config=config, select_feature="patch")


@pytest.mark.parametrize(
    "pinpoints",
    [PINPOINTS, "[[32, 64], [64, 32], [96, 64]]", "[(32, 64), (64, 32), (96, 64)]"],
)
def test_llavas_pinpoints_are_width_first_and_may_be_a_string(
    pinpoints: object, tmp_path: Path
) -> None:
    spec = read_flat(tmp_path, image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert spec.preprocessing.mode == "anyres"
    assert spec.preprocessing.grid_pinpoints == ((32, 64), (64, 32), (96, 64))


def test_pinpoints_of_another_mode_are_passed_over(tmp_path: Path) -> None:
    spec = read_flat(tmp_path, image_aspect_ratio="pad", image_grid_pinpoints="(1x1),...,(6x6)")
    assert spec.preprocessing.mode == "pad" and spec.preprocessing.grid_pinpoints == ()


@pytest.mark.parametrize(
    "pinpoints",
    [
        [], {}, 3, "", "(1x1),...,(6x6)", "__import__('os')", [[32]], [[32, 33]], [[32, 0]],
        [[-32, 32]], [[32, "32"]], [[32, True]], [32, 64], [[32.0, 64.0]], [[32, 64, 96]],
    ],
)  # fmt: skip
def test_pinpoints_that_are_no_sizes_in_tiles_are_refused(
    pinpoints: object, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="image_grid_pinpoints is .*multiples of the tile's"):
        read_flat(tmp_path, image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("anyres", "config.json lacks 'image_grid_pinpoints'"),
        ("anyres_max_9", "image_aspect_ratio is 'anyres_max_9'; of the kinds"),
        ("dynamic", "image_aspect_ratio is 'dynamic'; NVILA's tiling is not supported yet"),
        ("dynamic_s2", "image_aspect_ratio is 'dynamic_s2'; NVILA's tiling is not supported yet"),
        ("crop", "unknown image_aspect_ratio 'crop'; known: pad, resize, square, anyres"),
    ],
)
def test_a_mode_that_is_not_supported_says_so(mode: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_flat(tmp_path, image_aspect_ratio=mode)
    assert message in str(caught.value)
