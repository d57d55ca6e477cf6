"""transformers' own layout of LLaVA (`llava-hf/...`): one folder, one config with sub-configs.

Tensors have had several names. For the language model's, in the order of transformers' releases:

    language_model.model.layers.N...   language_model.lm_head.weight
    model.language_model.layers.N...   lm_head.weight
"""

from __future__ import annotations

import re
from pathlib import Path

from models.checkpoints.language_config import context_length, read_language_config
from models.checkpoints.layouts.base import (
    Layout,
    Request,
    check_precision,
    find_awq_store,
    names_in,
    select_first,
    select_projector,
)
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    PatchMerge,
    ProjectorSpec,
    PromptSpec,
)
from models.checkpoints.template_choice import choose_template
from models.checkpoints.tensor_files import TensorStore, open_folder
from models.checkpoints.vision_config import read_hf_vision
from models.checkpoints.weight_source import WeightSource
from models.json_config import JsonConfig
from models.registry import Registry

LANGUAGE = re.compile(
    r"(?:(?:model\.)?language_model\.)?(?:model\.)?(?P<own>(?:layers|embed_tokens|norm)\..+)"
)
HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?(?P<own>lm_head\..+)")
TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(?P<own>.+)")
PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(?P<own>.+)")
NEWLINE_NAME = "image_newline"
NEWLINE = re.compile(r"(?:model\.)?(?P<own>image_newline)")
PROJECTOR_NAMES = {
    f"linear_{number}.{kind}": f"{index}.{kind}"
    for number, index in ((1, 0), (2, 2))
    for kind in ("weight", "bias")
}
"""transformers' names -> those of `mlp2x_gelu`, which is the same projector."""

MERGES: Registry[PatchMerge] = Registry("model_type of transformers' layout")
MERGES.register("llava", "flat")
MERGES.register("llava_next", "spatial_unpad")
"""How each architecture joins a picture's tiles; LLaVA's pictures are one tile."""


class HfLayout(Layout):
    def matches(self, root: Path, config: JsonConfig) -> bool:
        return "text_config" in config and "vision_config" in config

    def open(self, request: Request) -> Checkpoint:
        root, config = request.location.root, request.config
        merge = MERGES[config.require("model_type", str)]
        if config.get("projector_hidden_act", str, "gelu") != "gelu":
            raise config.problem("projector_hidden_act", "only gelu is supported")
        awq = find_awq_store(request, [root])
        own = open_folder(root, root, exclude=awq)
        language = _language(awq or own)
        check_precision(language, request, [root.name])

        text_config = _text_config(config)
        language_config = read_language_config(text_config, required=())
        vision = read_hf_vision(root, model_config=config)
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
                merge=merge,
                bias=config.get("multimodal_projector_bias", bool, True),
            ),
            prompt=PromptSpec(
                template=request.template
                or choose_template(request.location.name, language_config, root),
                tokenization="whole",
            ),
            tokenizer_path=root,
            context_length=context_length(text_config, language_config),
        )
        return Checkpoint(
            spec,
            language,
            select_projector([awq, own], merge, PROJECTOR, NEWLINE, NEWLINE_NAME).renamed(
                PROJECTOR_NAMES
            ),
            select_first([awq, own], "vision tower", TOWER),
        )


def _language(store: TensorStore) -> WeightSource:
    """Everything that is not another component's, so that what is left over is noticed."""
    layers, others = {}, {}
    for name in names_in(store):
        if match := LANGUAGE.fullmatch(name):
            layers[name] = f"model.{match['own']}"
        elif match := HEAD.fullmatch(name):
            others[name] = match["own"]
        elif not any(pattern.fullmatch(name) for pattern in (TOWER, PROJECTOR, NEWLINE)):
            others[name] = name
    # Messages name a missing tensor after its siblings, the first of which is one of the layers';
    # but the head is not called after them.
    old = any(name.startswith("language_model.") for name in layers)
    head = {"language_model.lm_head.weight" if old else "lm_head.weight": "lm_head.weight"}
    return WeightSource.select("language model", store, {**layers, **head, **others})


def _text_config(config: JsonConfig) -> JsonConfig:
    """With the defaults of transformers' LlavaConfig, which released files rely on."""
    text = config.sub("text_config")
    inherited = {
        "model_type": "llama",
        "tie_word_embeddings": config.values.get("tie_word_embeddings"),
    }
    return JsonConfig({**inherited, **text.values}, text.label)
