"""transformers' own layout of LLaVA (`llava-hf/...`): one folder, one config with sub-configs.

Tensors have had several names. For the language model's, in the order of transformers' releases:

    language_model.model.layers.N...   language_model.lm_head.weight
    model.language_model.layers.N...   lm_head.weight
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints.language_config import context_length, read_language_config
from models.checkpoints.layouts.base import (
    Layout,
    Request,
    check_image_newline,
    check_precision,
    find_awq_store,
    names_in,
    select_first,
)
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    PatchMerge,
    ProjectorSpec,
    PromptSpec,
)
from models.checkpoints.template_choice import choose_template
from models.checkpoints.tensor_files import TensorStore, label_of, open_folder
from models.checkpoints.vision_config import read_vision
from models.checkpoints.weight_source import WeightSource
from models.json_config import JsonConfig
from models.registry import Registry

LANGUAGE = re.compile(
    r"(?:(?:model\.)?language_model\.)?(?:model\.)?(?P<own>(?:layers|embed_tokens|norm)\..+)"
)
HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?(?P<own>lm_head\..+)")
TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(?P<own>.+)")
PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(?P<own>.+)")
NEWLINE = re.compile(r"(?:model\.)?(?P<own>image_newline)")
PROJECTOR_NAMES = {
    f"linear_{number}.{kind}": f"{index}.{kind}"
    for number, index in ((1, 0), (2, 2))
    for kind in ("weight", "bias")
}
"""transformers' names -> those of `mlp2x_gelu`, which is the same projector."""

SELECT_FEATURES: Registry[str] = Registry("vision_feature_select_strategy")
SELECT_FEATURES.register("default", "patch")
SELECT_FEATURES.register("full", "cls_patch")


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        tiles: pictures are cut into tiles ("anyres").
        merge: how those are joined.
    """

    tiles: bool
    merge: PatchMerge


ARCHITECTURES: Registry[Architecture] = Registry("model_type of transformers' layout")
ARCHITECTURES.register("llava", Architecture(tiles=False, merge="flat"))
ARCHITECTURES.register("llava_next", Architecture(tiles=True, merge="spatial_unpad"))

DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""transformers' own, (height, width)."""


class HfLayout(Layout):
    def matches(self, root: Path, config: JsonConfig) -> bool:
        return "text_config" in config and "vision_config" in config

    def open(self, request: Request) -> Checkpoint:
        root, config = request.location.root, request.config
        architecture = ARCHITECTURES[config.require("model_type", str)]
        _check_projector(config)
        awq = find_awq_store(request, [root])
        own = open_folder(root, root, exclude=awq)
        language = _language(awq or own)
        check_precision(language, request, [root.name])

        text_config = _text_config(config)
        language_config = read_language_config(text_config, required=())
        processor = _processor(root)
        vision = read_vision(
            root,
            root,
            model_config=_as_llavas(config, processor, architecture),
            select_feature="patch",
            processor=processor,
        )
        spec = ModelSpec(
            name=request.location.name,
            root=root,
            layout="hf",
            precision=request.precision,
            language=language_config,
            vision=vision,
            projector=ProjectorSpec(
                kind="mlp2x_gelu",
                in_features=vision.config.hidden_size,
                out_features=language_config.hidden_size,
                token_order=request.token_order or "row",
                merge=architecture.merge,
            ),
            prompt=PromptSpec(
                template=request.template
                or choose_template(request.location.name, language_config),
                tokenization="whole",
            ),
            tokenizer_path=root,
            context_length=context_length(text_config, language_config),
        )
        stores = [awq, own]
        unpads = architecture.merge == "spatial_unpad"
        patterns = (PROJECTOR, NEWLINE) if unpads else (PROJECTOR,)
        projector = select_first(stores, "projector", *patterns)
        if unpads:
            check_image_newline(projector, "image_newline")
        return Checkpoint(
            spec,
            language,
            projector.renamed(PROJECTOR_NAMES),
            select_first(stores, "vision tower", TOWER),
        )


def _language(store: TensorStore) -> WeightSource:
    """Everything that is not another component's, so that what is left over is noticed."""
    own_names = {}
    for name in names_in(store):
        if match := LANGUAGE.fullmatch(name):
            own_names[name] = f"model.{match['own']}"
        elif match := HEAD.fullmatch(name):
            own_names[name] = match["own"]
        elif not any(pattern.fullmatch(name) for pattern in (TOWER, PROJECTOR, NEWLINE)):
            own_names[name] = name
    return WeightSource.select("language model", store, own_names)


def _check_projector(config: JsonConfig) -> None:
    for key, kind, supported in (
        ("projector_hidden_act", str, "gelu"),
        ("multimodal_projector_bias", bool, True),
    ):
        if config.get(key, kind, supported) != supported:
            raise config.problem(key, f"only {supported!r} is supported")


def _text_config(config: JsonConfig) -> JsonConfig:
    """With the defaults of transformers' LlavaConfig, which released files rely on."""
    text = config.sub("text_config")
    inherited = {
        "model_type": "llama",
        "tie_word_embeddings": config.values.get("tie_word_embeddings"),
    }
    return JsonConfig({**inherited, **text.values}, text.label)


def _processor(root: Path) -> JsonConfig:
    """Newer releases of transformers nest it in processor_config.json, and look there first."""
    path = root / "processor_config.json"
    if path.is_file():
        config = JsonConfig.read(path, label_of(path, root))
        if "image_processor" in config:
            return config.sub("image_processor")
    path = root / "preprocessor_config.json"
    return JsonConfig.read(path, label_of(path, root))


def _as_llavas(config: JsonConfig, processor: JsonConfig, kind: Architecture) -> JsonConfig:
    """What the config says of pictures, under the keys of LLaVA's own layout."""
    strategy = config.get("vision_feature_select_strategy", str, "default")
    values: dict[str, Any] = {
        "mm_vision_select_layer": config.get("vision_feature_layer", int, -2),
        "mm_vision_select_feature": SELECT_FEATURES[strategy],
        "image_aspect_ratio": _aspect_ratio(processor, kind),
    }
    if kind.tiles:
        values["image_grid_pinpoints"] = _pinpoints(config, processor)
    return JsonConfig(values, config.label)


def _aspect_ratio(processor: JsonConfig, kind: Architecture) -> str:
    if kind.tiles:
        return "anyres"
    # LLaVA-NeXT's and CLIP's `do_pad` mean other things.
    pads = processor.get("image_processor_type", str, "").startswith("LlavaImageProcessor")
    return "pad" if pads and processor.get("do_pad", bool, False) else "square"


def _pinpoints(config: JsonConfig, processor: JsonConfig) -> list[list[int]]:
    """(width, height), as LLaVA has them; transformers has (height, width)."""
    key = "image_grid_pinpoints"
    pairs = config.get(key, list, DEFAULT_PINPOINTS)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise config.problem(key, "it must be a list of [height, width]")
    if processor.get(key, list, pairs) != pairs:
        raise processor.problem(key, f"{config.label} has {pairs}; they must be the same")
    return [[width, height] for height, width in pairs]
