"""LLaVA's layout: one flat folder. The tower lies inside, or in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast, get_args

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
from models.checkpoints.locations import locate
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    PatchMerge,
    ProjectorSpec,
    PromptSpec,
)
from models.checkpoints.template_choice import choose_template
from models.checkpoints.tensor_files import (
    TensorStore,
    label_of,
    open_folder,
    open_tensor_file,
)
from models.checkpoints.vision_config import read_vision
from models.checkpoints.weight_source import WeightSource
from models.json_config import JsonConfig

PROJECTOR = re.compile(r"model\.mm_projector\.(?P<own>.+)")
NEWLINE_NAME = "model.image_newline"
NEWLINE = re.compile(r"model\.(?P<own>image_newline)")
TOWER = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(?P<own>.+)")
TOWER_FOLDER = re.compile(
    r"(?:vision_model\.)?(?P<own>(?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)"
)
"""In a folder of its own the tower may be half of a whole CLIP, whose other half is passed over."""
STRAY_PROJECTOR = "mm_projector.bin"
"""LLaVA's first training stage leaves the projector in this file, beside the others."""


class LlavaLayout(Layout):
    def matches(self, root: Path, config: JsonConfig) -> bool:
        return "mm_vision_tower" in config

    def open(self, request: Request) -> Checkpoint:
        root, config = request.location.root, request.config
        awq = find_awq_store(request, [root])
        own = open_folder(root, root, exclude=awq)
        language = _language(awq or own)
        check_precision(language, request, [root.name])

        tower_folder = self._tower_folder(request)
        language_config = read_language_config(config)
        vision = read_vision(tower_folder, root, model_config=config, select_feature="patch")
        merge = _merge(config, vision.preprocessing.mode)
        spec = ModelSpec(
            name=request.location.name,
            root=root,
            layout="llava",
            precision=request.precision,
            language=language_config,
            vision=vision,
            projector=ProjectorSpec(
                kind=config.get("mm_projector_type", str, "linear"),
                in_features=vision.config.hidden_size,
                out_features=language_config.hidden_size,
                token_order=request.token_order or "row",
                merge=merge,
            ),
            prompt=PromptSpec(
                template=request.template
                or choose_template(request.location.name, language_config, root),
                use_im_start_end=config.get("mm_use_im_start_end", bool, False),
                use_im_patch_token=config.get("mm_use_im_patch_token", bool, True),
            ),
            tokenizer_path=root,
            context_length=context_length(config, language_config),
        )
        return Checkpoint(
            spec,
            language,
            # The only projector with a single layer has no index in its names.
            select_projector(
                [awq, own, *_stray_projector(root)], merge, PROJECTOR, NEWLINE, NEWLINE_NAME
            ).renamed({"weight": "0.weight", "bias": "0.bias"}),
            _tower([awq, own], tower_folder, root),
        )

    def _tower_folder(self, request: Request) -> Path:
        """`mm_vision_tower`: a folder, relative to the checkpoint or absolute, or a Hub id."""
        name = request.config.require("mm_vision_tower", str)
        inside = request.location.root / name
        if inside.is_dir():
            return inside
        what = f"mm_vision_tower in {request.config.label}"
        return locate(name, what, may_download=request.may_download).root


def _merge(config: JsonConfig, mode: str) -> PatchMerge:
    """How tiles are joined; LLaVA's default is "flat". Only "anyres" makes any."""
    if mode != "anyres":
        return "flat"
    merge = config.get("mm_patch_merge_type", str, "flat")
    if merge not in get_args(PatchMerge):
        raise config.problem("mm_patch_merge_type", f"known: {', '.join(get_args(PatchMerge))}")
    return cast(PatchMerge, merge)


def _language(store: TensorStore) -> WeightSource:
    others = (PROJECTOR, NEWLINE, TOWER)
    names = {
        name: name
        for name in names_in(store)
        if not any(pattern.fullmatch(name) for pattern in others)
    }
    return WeightSource.select("language model", store, names)


def _tower(stores: Iterable[TensorStore | None], folder: Path, root: Path) -> WeightSource:
    source = select_first(stores, "vision tower", TOWER)
    if source.names():
        return source
    return select_first([open_folder(folder, root)], "vision tower", TOWER_FOLDER)


def _stray_projector(root: Path) -> Iterable[TensorStore]:
    path = root / STRAY_PROJECTOR
    if path.is_file():
        label = label_of(path, root)
        yield TensorStore.of(label, [open_tensor_file(path, label)])
