"""What the files say of the tower and of the pictures that it is given -> VisionSpec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, SiglipVisionConfig

from models.checkpoints.preprocessing_config import (
    PINPOINTS,
    Resize,
    read_hf_pinpoints,
    read_mode,
    read_pinpoints,
    read_preprocessing,
)
from models.checkpoints.spec import PreprocessingSpec, VisionSpec
from models.checkpoints.tensor_files import label_of
from models.errors import CheckpointError
from models.json_config import JsonConfig
from models.registry import Registry

TowerConfig: TypeAlias = CLIPVisionConfig | SiglipVisionConfig


@dataclass(frozen=True)
class TowerFamily:
    """What is peculiar to a kind of tower."""

    config: type[TowerConfig]
    resize: Resize
    center_crop: bool


FAMILIES: Registry[TowerFamily] = Registry("vision tower")
FAMILIES.register("clip", TowerFamily(CLIPVisionConfig, "shortest_edge", center_crop=True))
FAMILIES.register("siglip", TowerFamily(SiglipVisionConfig, "square", center_crop=False))

TOWER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout",
    "vision_use_head",
)  # fmt: skip
SELECT_FEATURES: Registry[str] = Registry("mm_vision_select_feature")
for _name in ("patch", "cls_patch"):
    SELECT_FEATURES.register(_name, _name)
HF_SELECT_FEATURES: Registry[str] = Registry("vision_feature_select_strategy")
for _name, _feature in {"default": "patch", "full": "cls_patch"}.items():
    HF_SELECT_FEATURES.register(_name, _feature)


def read_vision(
    folder: Path, root: Path, *, model_config: JsonConfig, select_feature: str
) -> VisionSpec:
    """LLaVA's and VILA's layouts, where the tower's two files lie in a folder of their own.

    Args:
        folder: the tower's.
        model_config: the whole model's config.json.
        select_feature: where that says nothing.

    Raises:
        CheckpointError: a key is missing or wrong, or the tower is of an unknown kind.
    """
    config = JsonConfig.read(folder / "config.json", label_of(folder / "config.json", root))
    if "vision_config" in config:  # a whole CLIP or SigLIP, of which only this half is wanted
        outer = config
        config = config.sub("vision_config")
        config.values.setdefault("model_type", outer.get("model_type", str, ""))
    family = _family(config)
    tower = _tower(config, family)
    feature = SELECT_FEATURES[model_config.get("mm_vision_select_feature", str, select_feature)]
    layer = model_config.get("mm_vision_select_layer", int, -2)
    _check_layer(layer, tower, model_config, "mm_vision_select_layer")
    mode = read_mode(model_config)
    processor = _read(folder / "preprocessor_config.json", root)
    preprocessing = read_preprocessing(
        processor, mode=mode, resize=family.resize, center_crop=family.center_crop
    )
    if mode == "anyres":
        pinpoints = read_pinpoints(model_config, preprocessing.crop_size)
        preprocessing = replace(preprocessing, grid_pinpoints=pinpoints)
    _check_sizes(preprocessing, processor, tower, config)
    return VisionSpec(tower, layer, feature, preprocessing)


def read_hf_vision(root: Path, *, model_config: JsonConfig) -> VisionSpec:
    """transformers' layout: the tower is `vision_config` in config.json, and the image processor
    lies beside it, in processor_config.json or preprocessor_config.json.

    Raises:
        CheckpointError: a key is missing or wrong, or the tower is of an unknown kind.
    """
    config = model_config.sub("vision_config")
    config = JsonConfig({"model_type": "clip_vision_model", **config.values}, config.label)
    family = _family(config)
    tower = _tower(config, family)
    strategy = "vision_feature_select_strategy"
    feature = HF_SELECT_FEATURES[model_config.get(strategy, str, "default")]
    if feature == "patch" and not isinstance(tower, CLIPVisionConfig):
        raise model_config.problem(
            strategy, f"a {config.values['model_type']} has no class token to leave out; it is full"
        )
    layer = _hf_layer(model_config)
    _check_layer(layer, tower, model_config, "vision_feature_layer")
    processor = _hf_processor(root)
    preprocessing = read_preprocessing(
        processor,
        mode=_hf_mode(model_config, processor),
        resize=family.resize,
        center_crop=family.center_crop,
    )
    if preprocessing.mode == "anyres":
        pinpoints = read_hf_pinpoints(model_config, preprocessing.crop_size)
        if pinpoints != read_hf_pinpoints(processor, preprocessing.crop_size):
            raise processor.problem(PINPOINTS, f"it must be as in {model_config.label}")
        preprocessing = replace(preprocessing, grid_pinpoints=pinpoints)
    _check_sizes(preprocessing, processor, tower, config)
    return VisionSpec(tower, layer, feature, preprocessing)


def _read(path: Path, root: Path) -> JsonConfig:
    return JsonConfig.read(path, label_of(path, root))


def _family(config: JsonConfig) -> TowerFamily:
    return FAMILIES[config.require("model_type", str).removesuffix("_vision_model")]


def _tower(config: JsonConfig, family: TowerFamily) -> TowerConfig:
    values = {key: config.values[key] for key in TOWER_KEYS if key in config}
    try:
        return family.config(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise config.problem("model_type", f"its config does not fit together: {error}") from error


def _check_layer(layer: int, tower: TowerConfig, model_config: JsonConfig, key: str) -> None:
    if not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers:
        raise model_config.problem(key, f"the tower has {tower.num_hidden_layers} layers")


def _check_sizes(
    preprocessing: PreprocessingSpec, processor: JsonConfig, tower: TowerConfig, config: JsonConfig
) -> None:
    if preprocessing.crop_size != tower.image_size:
        raise CheckpointError(
            f"{processor.label} makes pictures of {preprocessing.crop_size} pixels, "
            f"but the tower reads {tower.image_size} (image_size in {config.label})"
        )


def _hf_layer(model_config: JsonConfig) -> int:
    key = "vision_feature_layer"
    layers = model_config.values.get(key)
    if isinstance(layers, list):
        if len(layers) != 1 or type(layers[0]) is not int:
            raise model_config.problem(
                key, "joining the features of several layers is not supported; it must be a number"
            )
        return layers[0]
    return model_config.get(key, int, -2)


def _hf_processor(root: Path) -> JsonConfig:
    """As transformers looks for it: the newer file first, which may hold other processors only."""
    path = root / "processor_config.json"
    if path.is_file():
        config = _read(path, root)
        if "image_processor" in config:
            return config.sub("image_processor")
    return _read(root / "preprocessor_config.json", root)


def _hf_mode(model_config: JsonConfig, processor: JsonConfig) -> str:
    if model_config.get("model_type", str, "") == "llava_next":
        return "anyres"
    # Only LLaVA's own processor means the square by it; others would pad a batch.
    kind = processor.get("image_processor_type", str, "")
    if kind.startswith("LlavaImageProcessor") and processor.get("do_pad", bool, False):
        return "pad"
    return "default"
