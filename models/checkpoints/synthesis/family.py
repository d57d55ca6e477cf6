"""What a family of checkpoints is made of, and how it becomes a tiny one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

LayoutName: TypeAlias = Literal["llava", "vila", "hf"]

TINY_PATCH = {"clip": 8, "siglip": 4}
TINY_CONTEXT = 1024
TINY_VOCABULARY = 400


@dataclass(frozen=True)
class LanguageModel:
    """
    Attributes:
        kind: transformers' model_type: "llama", "mistral" or "qwen2".
        positions: max_position_embeddings.
        bias: of the attention's projections, where the kind leaves that to the config.
    """

    kind: Literal["llama", "mistral", "qwen2"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    positions: int = 4096
    eps: float = 1e-5
    rope_theta: float = 10000.0
    bias: bool = False


@dataclass(frozen=True)
class Tower:
    """
    Attributes:
        name: the Hub id that LLaVA's configs name it by.
        use_head: SigLIP's pooling head is there.
    """

    kind: Literal["clip", "siglip"]
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    use_head: bool = True


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        vocabulary: pieces of the base tokenizer, without the tokens that were added to it.
        tokenizer: a name in `models.checkpoints.synthesis.tokenizers`.
        aspect_ratio: `image_aspect_ratio`; None where the released config has no such key.
        pinpoints: (width, height) of the resolutions for "anyres".
        frame: pictures are framed by `<im_start>` and `<im_end>`.
        tower_inside: LLaVA's layout only: the tower's weights lie among the model's own.
        file_format: of the 16-bit weights.
        model_max_length: VILA's layout only.
        extra: further keys of config.json.
    """

    name: str
    layout: LayoutName
    language: LanguageModel
    tower: Tower
    projector: str
    vocabulary: int = 32000
    tokenizer: str = "llama"
    dtype: torch.dtype = torch.float16
    aspect_ratio: str | None = "pad"
    pinpoints: tuple[tuple[int, int], ...] = ()
    frame: bool = False
    tower_inside: bool = False
    file_format: Literal["safetensors", "bin"] = "safetensors"
    model_max_length: int = 4096
    extra: tuple[tuple[str, object], ...] = ()


def tiny(family: Family) -> Family:
    """The same of everything, with small numbers: about 3 MB in 16 bits."""
    grouped = family.language.kv_heads < family.language.heads
    language = replace(
        family.language, hidden=256, intermediate=384, layers=2, heads=4,
        kv_heads=2 if grouped else 4, positions=TINY_CONTEXT,
    )  # fmt: skip
    whole, patch = family.tower.image_size, TINY_PATCH[family.tower.kind]
    # About a sixth or quarter of the grid's side, and odd where that was odd, so that downsampling
    # pads what it padded.
    divisor = 6 if family.tower.kind == "clip" else 4
    side = math.ceil(whole // family.tower.patch_size / divisor)
    tower = replace(
        family.tower, hidden=64, intermediate=96, layers=3, heads=4, image_size=side * patch,
        patch_size=patch,
    )  # fmt: skip
    pinpoints = tuple(
        (width // whole * tower.image_size, height // whole * tower.image_size)
        for width, height in family.pinpoints
    )
    return replace(
        family, language=language, tower=tower, pinpoints=pinpoints,
        vocabulary=TINY_VOCABULARY, model_max_length=TINY_CONTEXT,
    )  # fmt: skip
