"""LLaVA's layout: one flat folder. The tower lies inside, or in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from models.checkpoints.language_config import context_length, read_language_config
from models.checkpoints.layouts.base import (
    Layout,
    Request,
    check_precision,
    find_awq_store,
)
from models.checkpoints.locations import locate
from models.checkpoints.spec import Checkpoint, ModelSpec, ProjectorSpec, PromptSpec
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

        tower_folder = self._tower_folder(root, config)
        language_config = read_language_config(config)
        vision = read_vision(tower_folder, root, model_config=config, select_feature="patch")
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
            _projector([awq, own, *_stray_projector(root)]),
            _tower([awq, own], tower_folder, root),
        )

    def _tower_folder(self, root: Path, config: JsonConfig) -> Path:
        """`mm_vision_tower`: a folder, relative to the checkpoint or absolute, or a Hub id."""
        name = config.require("mm_vision_tower", str)
        inside = root / name
        if inside.is_dir():
            return inside
        return locate(name, f"mm_vision_tower in {config.label}").root


def _language(store: TensorStore) -> WeightSource:
    names = {
        name: name
        for name in _names(store)
        if not PROJECTOR.fullmatch(name) and not TOWER.fullmatch(name)
    }
    return WeightSource.select("language model", store, names)


def _projector(stores: Iterable[TensorStore | None]) -> WeightSource:
    """From the first that has any of it."""
    source = _first(stores, "projector", PROJECTOR)
    # The only projector with a single layer has no index in its names.
    return source.renamed({"weight": "0.weight", "bias": "0.bias"})


def _tower(stores: Iterable[TensorStore | None], folder: Path, root: Path) -> WeightSource:
    source = _first(stores, "vision tower", TOWER)
    if source.names():
        return source
    return _first([open_folder(folder, root)], "vision tower", TOWER_FOLDER)


def _first(
    stores: Iterable[TensorStore | None], component: str, pattern: re.Pattern[str]
) -> WeightSource:
    found = WeightSource(component, {}, "the checkpoint")
    for store in stores:
        if store is None:
            continue
        matches = {name: pattern.fullmatch(name) for name in _names(store)}
        own_names = {name: match["own"] for name, match in matches.items() if match}
        found = WeightSource.select(component, store, own_names)
        if found.names():
            return found
    return found


def _names(store: TensorStore) -> Iterable[str]:
    return [*store.files, *(name for name in store.absent if name not in store.files)]


def _stray_projector(root: Path) -> Iterable[TensorStore]:
    path = root / STRAY_PROJECTOR
    if path.is_file():
        label = label_of(path, root)
        yield TensorStore.of(label, [open_tensor_file(path, label)])
