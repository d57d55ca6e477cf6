"""VILA's layout: `llm/`, `vision_tower/` and `mm_projector/`, each saved by itself."""

from __future__ import annotations

import re
from pathlib import Path

from models.checkpoints.language_config import (
    context_length,
    extend_context,
    read_language_config,
)
from models.checkpoints.layouts.base import (
    Layout,
    Request,
    check_precision,
    find_awq_store,
)
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    ProjectorSpec,
    PromptSpec,
    TokenOrder,
)
from models.checkpoints.template_choice import choose_template
from models.checkpoints.tensor_files import TensorStore, label_of, open_folder
from models.checkpoints.vision_config import read_vision
from models.checkpoints.weight_source import WeightSource
from models.json_config import JsonConfig

LLM = re.compile(r"(?:llm\.)?(?P<own>.+)")
TOWER = re.compile(r"(?:vision_tower\.)?(?:vision_model\.)?(?P<own>.+)")
PROJECTOR = re.compile(r"(?:layers\.)?(?P<own>.+)")

NVILA_KEYS = (
    "min_tiles",
    "max_tiles",
    "video_max_tiles",
    "num_time_tokens",
    "dynamic_s2",
)
"""Keys that VILA's code writes since NVILA's release, and did not before."""


class VilaLayout(Layout):
    def matches(self, root: Path, config: JsonConfig) -> bool:
        return "llm_cfg" in config or ((root / "llm").is_dir() and (root / "mm_projector").is_dir())

    def open(self, request: Request) -> Checkpoint:
        root, config = request.location.root, request.config
        # The paths inside the config are those of the machine that trained; the folders' names
        # are fixed.
        llm, tower, projector = (
            root / "llm",
            root / "vision_tower",
            root / "mm_projector",
        )
        awq = find_awq_store(request, [llm, root])
        language = _component("language model", awq or open_folder(llm, root), LLM)
        check_precision(language, request, [label_of(llm, root), root.name])

        label = label_of(llm / "config.json", root)
        llm_config = extend_context(JsonConfig.read(llm / "config.json", label))
        language_config = read_language_config(llm_config)
        vision = read_vision(tower, root, model_config=config, select_feature="cls_patch")
        label = label_of(projector / "config.json", root)
        projector_config = JsonConfig.read(projector / "config.json", label)
        spec = ModelSpec(
            name=request.location.name,
            root=root,
            layout="vila",
            precision=request.precision,
            language=language_config,
            vision=vision,
            projector=ProjectorSpec(
                kind=projector_config.require("mm_projector_type", str),
                in_features=vision.config.hidden_size,
                out_features=language_config.hidden_size,
                token_order=request.token_order or token_order(config),
            ),
            prompt=PromptSpec(
                template=request.template
                or choose_template(request.location.name, language_config, llm),
                use_im_start_end=config.get("mm_use_im_start_end", bool, False),
                use_im_patch_token=config.get("mm_use_im_patch_token", bool, False),
            ),
            tokenizer_path=llm,
            context_length=context_length(llm_config, language_config),
        )
        return Checkpoint(
            spec,
            language,
            _component("projector", open_folder(projector, root), PROJECTOR),
            _component("vision tower", open_folder(tower, root), TOWER),
        )


def token_order(config: JsonConfig) -> TokenOrder:
    """By the checkpoint's era. VILA-1.5's code lacked the last permutation of its downsampling
    block, and its checkpoints were trained so: column by column. NVILA's go row by row.
    """
    dynamic = config.get("image_aspect_ratio", str, "").startswith("dynamic")
    return "row" if dynamic or any(key in config for key in NVILA_KEYS) else "column"


def _component(component: str, store: TensorStore, pattern: re.Pattern[str]) -> WeightSource:
    own_names = {}
    for name in [
        *store.files,
        *(name for name in store.absent if name not in store.files),
    ]:
        match = pattern.fullmatch(name)
        own_names[name] = match["own"] if match else name
    return WeightSource.select(component, store, own_names)
