"""preprocessor_config.json, and what config.json says of pictures -> PreprocessingSpec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, TypeAlias, cast

from models.checkpoints.spec import PreprocessingSpec
from models.json_config import JsonConfig
from models.registry import Registry

Resize: TypeAlias = Literal["shortest_edge", "square"]
Pinpoints: TypeAlias = tuple[tuple[int, int], ...]

PINPOINTS = "image_grid_pinpoints"
HF_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""transformers' own, where a file has none."""

MODES: Registry[str] = Registry("image_aspect_ratio")
for _name, _mode in {
    "pad": "pad", "resize": "resize", "square": "default", "anyres": "anyres",
}.items():  # fmt: skip
    MODES.register(_name, _mode)


def read_mode(model_config: JsonConfig) -> str:
    """LLaVA's and VILA's `image_aspect_ratio` -> a `PreprocessingSpec.mode`.

    Raises:
        CheckpointError: it is unknown, or known and not supported.
    """
    key = "image_aspect_ratio"
    name = model_config.get(key, str, "square")
    if name.startswith("dynamic"):
        raise model_config.problem(
            key, "NVILA's tiling is not supported yet; with resize the model sees single tiles"
        )
    if name.startswith("anyres_"):
        raise model_config.problem(
            key, "of the kinds that cut pictures into tiles, only LLaVA-1.6's anyres is supported"
        )
    return MODES[name]


def read_preprocessing(
    config: JsonConfig, *, mode: str, resize: Resize, center_crop: bool
) -> PreprocessingSpec:
    """
    Args:
        config: the image processor's.
        mode: as in `PreprocessingSpec`, whose `grid_pinpoints` are left empty.
        resize, center_crop: what the processor does where `config` does not say.

    Raises:
        CheckpointError: a key is missing, or has a value that is not supported.
    """
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(key, bool, True):
            raise config.problem(key, "only true is supported")
    resize, size = _size(config, "size", resize)
    crop_size = size
    if config.get("do_center_crop", bool, center_crop):
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


def read_pinpoints(config: JsonConfig, tile: int) -> Pinpoints:
    """LLaVA's `image_grid_pinpoints`, pairs of (width, height), in the file's order, which breaks
    ties. The whole list may be a string.

    Args:
        tile: pixels of a tile's side.

    Raises:
        CheckpointError: the key is missing, or is no list of sizes in whole tiles.
    """
    return _pinpoints(config, config.require(PINPOINTS, object), tile)


def read_hf_pinpoints(config: JsonConfig, tile: int) -> Pinpoints:
    """transformers' `image_grid_pinpoints`, pairs of (height, width) -> (width, height).

    Raises:
        CheckpointError: it is no list of sizes in whole tiles.
    """
    value = config.get(PINPOINTS, object, HF_PINPOINTS)
    return tuple((width, height) for height, width in _pinpoints(config, value, tile))


def _pinpoints(config: JsonConfig, value: object, tile: int) -> Pinpoints:
    if isinstance(value, str):
        try:
            value = json.loads(value.replace("(", "[").replace(")", "]"))
        except ValueError:
            value = None
    if not isinstance(value, list) or not value or not all(_is_pinpoint(p, tile) for p in value):
        raise config.problem(
            PINPOINTS, f"it must be a list of pairs of pixels, multiples of the tile's {tile}"
        )
    return tuple((first, second) for first, second in value)


def _is_pinpoint(value: object, tile: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(edge) is int and edge > 0 and edge % tile == 0 for edge in value)
    )


def _size(config: JsonConfig, key: str, resize: Resize) -> tuple[Resize, int]:
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
