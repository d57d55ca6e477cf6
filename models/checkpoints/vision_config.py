"""A tower's folder (config.json, preprocessor_config.json) -> VisionSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, SiglipVisionConfig

from models.checkpoints.spec import PreprocessingSpec, VisionSpec
from models.checkpoints.tensor_files import label_of
from models.errors import CheckpointError
from models.json_config import JsonConfig
from models.registry import Registry


@dataclass(frozen=True)
class TowerFamily:
    """What is peculiar to a kind of tower."""

    config: type[CLIPVisionConfig | SiglipVisionConfig]
    resize: Literal["shortest_edge", "square"]
    center_crop: bool


FAMILIES: Registry[TowerFamily] = Registry("vision tower")
FAMILIES.register("clip", TowerFamily(CLIPVisionConfig, "shortest_edge", center_crop=True))
FAMILIES.register("siglip", TowerFamily(SiglipVisionConfig, "square", center_crop=False))

MODES: Registry[str] = Registry("image_aspect_ratio")
for _name, _mode in {"pad": "pad", "resize": "resize", "square": "default"}.items():
    MODES.register(_name, _mode)

TOWER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout",
    "vision_use_head",
)  # fmt: skip
SELECT_FEATURES = ("patch", "cls_patch")


def read_vision(
    folder: Path,
    root: Path,
    *,
    model_config: JsonConfig,
    select_feature: str,
    processor: JsonConfig | None = None,
) -> VisionSpec:
    """
    Args:
        folder: the tower's.
        model_config: the whole model's config.json.
        select_feature: where that says nothing.
        processor: the image processor's config, where it is not preprocessor_config.json in
            `folder`.

    Raises:
        CheckpointError: a key is missing or wrong, or the tower is of an unknown kind.
    """
    config = JsonConfig.read(folder / "config.json", label_of(folder / "config.json", root))
    if "vision_config" in config:  # a whole CLIP or SigLIP, of which only this half is wanted
        outer = config
        config = config.sub("vision_config")
        config.values.setdefault("model_type", outer.get("model_type", str, ""))
    family_name = config.require("model_type", str).removesuffix("_vision_model")
    family = FAMILIES[family_name]
    values = {key: config.values[key] for key in TOWER_KEYS if key in config}
    try:
        tower = family.config(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise config.problem("model_type", f"its config does not fit together: {error}") from error
    feature = model_config.get("mm_vision_select_feature", str, select_feature)
    if feature not in SELECT_FEATURES:
        raise model_config.problem(
            "mm_vision_select_feature", f"known: {', '.join(SELECT_FEATURES)}"
        )
    layer = model_config.get("mm_vision_select_layer", int, -2)
    if not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers:
        raise model_config.problem(
            "mm_vision_select_layer", f"the tower has {tower.num_hidden_layers} layers"
        )
    mode = MODES[model_config.get("image_aspect_ratio", str, "square")]
    if processor is None:
        path = folder / "preprocessor_config.json"
        processor = JsonConfig.read(path, label_of(path, root))
    preprocessing = _read_preprocessing(processor, family, mode)
    if preprocessing.crop_size != tower.image_size:
        raise CheckpointError(
            f"{processor.label} makes pictures of {preprocessing.crop_size} pixels, "
            f"but the tower reads {tower.image_size} (image_size in {config.label})"
        )
    return VisionSpec(tower, layer, feature, preprocessing)


def _read_preprocessing(config: JsonConfig, family: TowerFamily, mode: str) -> PreprocessingSpec:
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(key, bool, True):
            raise config.problem(key, "only true is supported")
    resize, size = _size(config, "size", family.resize)
    crop_size = size
    if config.get("do_center_crop", bool, family.center_crop):
        if "crop_size" in config:
            crop_size = _size(config, "crop_size", "square")[1]
        if crop_size > size:
            raise config.problem("crop_size", f"it must not be above size ({size})")
    elif resize == "shortest_edge":
        raise config.problem("do_center_crop", "without it, pictures would not become squares")
    return PreprocessingSpec(
        mode=mode,
        resize=resize,
        size=size,
        crop_size=crop_size,
        mean=_channels(config, "image_mean"),
        std=_channels(config, "image_std"),
        resample=config.get("resample", int, 3),
        rescale_factor=config.get("rescale_factor", float, 1 / 255),
    )


def _size(
    config: JsonConfig, key: str, resize: Literal["shortest_edge", "square"]
) -> tuple[Literal["shortest_edge", "square"], int]:
    """Old files have a bare number, newer ones say which edge they mean."""
    value = config.values.get(key)
    if isinstance(value, Mapping):
        if set(value) == {"shortest_edge"}:
            resize, value = "shortest_edge", value["shortest_edge"]
        elif set(value) == {"height", "width"} and value["height"] == value["width"]:
            resize, value = "square", value["height"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise config.problem(
            key,
            "it must be a number of pixels, {shortest_edge: n} or {height: n, width: n}",
        )
    return resize, value


def _channels(config: JsonConfig, key: str) -> tuple[float, float, float]:
    value = config.require(key, list)
    if len(value) != 3 or not all(isinstance(entry, int | float) for entry in value):
        raise config.problem(key, "it must be three numbers")
    return cast(tuple[float, float, float], tuple(float(entry) for entry in value))
