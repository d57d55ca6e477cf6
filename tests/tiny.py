"""Tiny checkpoints of random weights, by the package's own synthesis, with single things changed.

    write_tiny_llava(tmp_path / "llava-tiny")     # W16A16 and W4A16 both load from that folder
    write_tiny_vila(tmp_path / "vila1.5-tiny")

The 16-bit language model's linears hold the values of the 4-bit ones, so both precisions answer
alike up to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig

from models.checkpoints.synthesis import FAMILIES, Family, synthesize, tiny
from models.checkpoints.synthesis.components import tower_config
from models.checkpoints.synthesis.family import TINY_CONTEXT, TINY_VOCABULARY
from models.checkpoints.synthesis.tokenizers.llama import sentencepiece_model
from models.checkpoints.synthesis.tokenizers.text import TEXT as TOKENIZER_TEXT
from tests.checkpoint_files import Tensors, awq_file, read_tensors, rewrite_tensors, write_tensors

__all__ = [
    "TOKENIZER_TEXT",
    "TOWER_HIDDEN",
    "clip_config",
    "siglip_config",
    "tokenizer_model",
    "write_tiny_llava",
    "write_tiny_vila",
]

LLAVA, VILA = tiny(FAMILIES["llava-v1.5-7b"]), tiny(FAMILIES["vila1.5-3b"])
TOWER_HIDDEN = LLAVA.tower.hidden
TOWER_FOLDER = "clip-tiny"
VISUAL = ("model.mm_projector.", "model.vision_tower.")


def write_tiny_llava(
    folder: Path,
    *,
    awq: bool = True,
    awq_only: bool = False,
    awq_holds_all: bool = False,
    projector: str = "mlp2x_gelu",
    tower_inside: bool = True,
    image_aspect_ratio: str | None = "pad",
    seed: int = 0,
    hidden: int = 256,
    intermediate: int = 512,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    group_size: int = 128,
    dtype: torch.dtype = torch.float16,
    context_length: int = TINY_CONTEXT,
    file_format: str = "safetensors",
    shards: int = 1,
) -> Path:
    """The flat layout of LLaVA-1.5: a CLIP tower (32 x 32, patches of 8: 16 tokens), a Llama.

    Args:
        awq: also write `<folder's name>-w4-g<group>-awq-v2.pt`, which holds the language model.
        awq_only: leave the language model's 16-bit tensors out.
        awq_holds_all: put projector and tower into the AWQ file too, and nowhere else.
        tower_inside: the tower's weights lie in the checkpoint; otherwise in its sub-folder
            "clip-tiny", as `vision_model.*`. Its two JSON files lie there in both cases.
        bias: of the attention's four projections (`attention_bias`).
        file_format: "safetensors" or "bin".
        shards: how many files the weights are cut into, with an index if more than one.
    """
    language = replace(
        LLAVA.language, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv_heads, positions=context_length, bias=bias,
    )  # fmt: skip
    family = replace(
        LLAVA, language=language, tower=replace(LLAVA.tower, name=TOWER_FOLDER), dtype=dtype,
        projector=projector, aspect_ratio=image_aspect_ratio, tower_inside=tower_inside,
        model_max_length=context_length,
    )  # fmt: skip
    own = _write(family, folder, folder, awq, group_size, seed)
    if awq and not awq_holds_all:
        rewrite_tensors(awq_file(folder), lambda tensors: _drop(tensors, visual=True))
    if awq_only:
        _drop(own, visual=False)
    if awq_holds_all:
        _drop(own, visual=True)
        (folder / TOWER_FOLDER / "model.safetensors").unlink(missing_ok=True)
    if own:
        write_tensors(folder, own, file_format, shards)
    if not tower_inside and not awq_holds_all:
        _reformat(folder / TOWER_FOLDER, file_format)
    return folder


def write_tiny_vila(
    folder: Path,
    *,
    awq: bool = True,
    awq_only: bool = False,
    seed: int = 0,
    hidden: int = 256,
    intermediate: int = 512,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    group_size: int = 128,
    dtype: torch.dtype = torch.float16,
    context_length: int = TINY_CONTEXT,
    file_format: str = "safetensors",
    shards: int = 1,
) -> Path:
    """VILA-1.5's layout: `llm/`, `vision_tower/` and `mm_projector/`.

    The SigLIP tower reads 28 x 28 in patches of 4: a grid of 7 x 7, which `mlp_downsample` pads
    to 8 x 8 and joins to 16 tokens. Arguments as in `write_tiny_llava`; with `awq_only` a stale
    index is left in `llm/`, as in the released AWQ checkpoints.
    """
    language = replace(
        VILA.language, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv_heads, positions=context_length,
    )  # fmt: skip
    family = replace(VILA, language=language, dtype=dtype, model_max_length=context_length)
    if awq_only:
        synthesize(
            family, folder, scale="full", formats=["llm-awq-v2"], group_size=group_size, seed=seed
        )
    else:
        own = _write(family, folder, folder / "llm", awq, group_size, seed)
        write_tensors(folder / "llm", own, file_format, shards)
    for part in ("vision_tower", "mm_projector"):
        _reformat(folder / part, file_format)
    return folder


def clip_config() -> CLIPVisionConfig:
    config = tower_config(LLAVA)
    assert isinstance(config, CLIPVisionConfig)
    return config


def siglip_config() -> SiglipVisionConfig:
    config = tower_config(VILA)
    assert isinstance(config, SiglipVisionConfig)
    return config


def tokenizer_model() -> bytes:
    """A sentencepiece model in Llama's settings: BPE, byte fallback, single digits."""
    return sentencepiece_model(TINY_VOCABULARY)


def _write(
    family: Family, folder: Path, main: Path, awq: bool, group_size: int, seed: int
) -> Tensors:
    """Takes the 16-bit tensors of `main` out of their file, to be written otherwise."""
    family = replace(family, file_format="safetensors")
    formats = ["16bit", "llm-awq-v2"] if awq else ["16bit"]
    synthesize(family, folder, scale="full", formats=formats, group_size=group_size, seed=seed)
    tensors = read_tensors(main / "model.safetensors")
    (main / "model.safetensors").unlink()
    return tensors


def _drop(tensors: Tensors, *, visual: bool) -> None:
    """Tower and projector, or everything else."""
    for name in [name for name in tensors if name.startswith(VISUAL) is visual]:
        del tensors[name]


def _reformat(folder: Path, file_format: str) -> None:
    if file_format != "safetensors":
        path = folder / "model.safetensors"
        write_tensors(folder, read_tensors(path), file_format)
        path.unlink()
