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
    select_first,
)
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    ProjectorSpec,
    PromptSpec,
)
from models.checkpoints.template_choice import choose_template
from models.checkpoints.tensor_files import label_of, open_folder
from models.checkpoints.vision_config import read_vision
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
    "image_encoder",
)
"""Keys that VILA's code writes since NVILA's release, and did not before."""
NVILA_PROJECTORS = ("mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix")
NVILA_IMAGE_SUFFIX = "\n"
"""NVILA's encoder ends each picture with the embedding of a newline."""


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
        language = select_first([awq or open_folder(llm, root)], "language model", LLM)
        check_precision(language, request, [label_of(llm, root), root.name])

        label = label_of(llm / "config.json", root)
        llm_config = extend_context(JsonConfig.read(llm / "config.json", label))
        language_config = read_language_config(llm_config)
        vision = read_vision(tower, root, model_config=config, select_feature="cls_patch")
        label = label_of(projector / "config.json", root)
        projector_kind = JsonConfig.read(projector / "config.json", label).require(
            "mm_projector_type", str
        )
        nvila = is_nvila(config, projector_kind)
        spec = ModelSpec(
            name=request.location.name,
            root=root,
            layout="vila",
            precision=request.precision,
            language=language_config,
            vision=vision,
            projector=ProjectorSpec(
                kind=projector_kind,
                in_features=vision.config.hidden_size,
                out_features=language_config.hidden_size,
                # VILA-1.5's code lacked the last permutation of its downsampling block, and its
                # checkpoints were trained so: column by column. NVILA's go row by row.
                token_order=request.token_order or ("row" if nvila else "column"),
            ),
            prompt=PromptSpec(
                template=request.template
                or choose_template(request.location.name, language_config),
                use_im_start_end=config.get("mm_use_im_start_end", bool, False),
                use_im_patch_token=config.get("mm_use_im_patch_token", bool, False),
                tokenization="whole" if nvila else "pieces",
                image_suffix=NVILA_IMAGE_SUFFIX if nvila else "",
            ),
            tokenizer_path=llm,
            context_length=context_length(llm_config, language_config),
        )
        return Checkpoint(
            spec,
            language,
            select_first([open_folder(projector, root)], "projector", PROJECTOR),
            select_first([open_folder(tower, root)], "vision tower", TOWER),
        )


def is_nvila(config: JsonConfig, projector_kind: str) -> bool:
    """Whether a checkpoint is of NVILA's era, which tokenises and downsamples in another way."""
    return projector_kind in NVILA_PROJECTORS or any(key in config for key in NVILA_KEYS)
