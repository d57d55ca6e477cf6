"""The way in: a path or Hub id, and what it should be served as."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

from models.checkpoints.layouts import LAYOUTS, Request
from models.checkpoints.locations import locate
from models.checkpoints.spec import Checkpoint, Precision, TokenOrder
from models.errors import CheckpointError, ConfigurationError
from models.json_config import JsonConfig
from models.prompts import TEMPLATES

logger = logging.getLogger(__name__)


def open_checkpoint(
    model_path: str | Path,
    quant_path: str | Path | None = None,
    precision: Precision = "W4A16",
    *,
    template: str | None = None,
    token_order: TokenOrder | None = None,
    may_download: bool = True,
) -> Checkpoint:
    """Finds a model's files and reads their headers and configs; no weights yet.

    Args:
        model_path: a folder, or a Hub id (the local cache first; HF_HUB_OFFLINE is honoured).
        quant_path: the AWQ weights: a file, or a folder with one. By default they are looked for
            in the checkpoint. Not used with W16A16.
        precision: "W4A16" or "W16A16".
        template: the conversation template, instead of the one that the model's name suggests;
            "tokenizer" is the checkpoint's own.
        token_order: "row" or "column", in which `mlp_downsample` emits its grid, instead of the
            one of the checkpoint's era.
        may_download: from the Hub, what is in no folder and not in the local cache.

    Raises:
        CheckpointError: the files cannot be served; says which and why.
        ConfigurationError: an argument is none of its choices.
    """
    for name, value, choices in (
        ("precision", precision, get_args(Precision)),
        ("token_order", token_order, (None, *get_args(TokenOrder))),
    ):
        if value not in choices:
            raise ConfigurationError(f"{name} is {value!r}; it must be one of {choices}")
    if template is not None:
        TEMPLATES[template]  # raises for an unknown one, before anything is looked for
    location = locate(model_path, may_download=may_download)
    config_file = location.root / "config.json"
    if not config_file.exists():
        raise CheckpointError(
            f"{location.root} has no config.json, so it is no checkpoint's folder; give the folder "
            "that holds the model's config.json, and an AWQ file as quant_path"
        )
    config = JsonConfig.read(config_file, "config.json")
    for name in LAYOUTS:
        layout = LAYOUTS[name]
        if layout.matches(location.root, config):
            if "auto_map" in config:
                logger.warning(
                    "%s: config.json names code of its own (auto_map), which is never run; the "
                    "checkpoint is served by this project's code for the layout %r",
                    location.name, name,
                )  # fmt: skip
            return layout.open(
                Request(
                    location, config, quant_path, precision, template, token_order, may_download
                )
            )
    own_code = "the code that auto_map names is never run; " if "auto_map" in config else ""
    raise CheckpointError(
        f"{location.name} is of no known layout ({', '.join(LAYOUTS)}): {own_code}its config.json "
        "has neither mm_vision_tower, nor llm_cfg, nor text_config and vision_config, so it is no "
        "LLaVA or VILA checkpoint, or a conversion of one that is not supported"
    )
