"""The families by name. Sizes are those of the released checkpoints."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.checkpoints.synthesis.family import Family, LanguageModel, Tower
from models.errors import ConfigurationError
from models.registry import Registry

FAMILIES: Registry[Family] = Registry("family of checkpoints", ConfigurationError)

LLAMA_7B = LanguageModel("llama", 4096, 11008, 32, 32, 32)
LLAMA_13B = LanguageModel("llama", 5120, 13824, 40, 40, 40)
LLAMA_3_8B = LanguageModel("llama", 4096, 14336, 32, 32, 8, positions=8192, rope_theta=500000.0)
SHEARED_LLAMA_2_7B = LanguageModel("llama", 2560, 6912, 32, 20, 20)
MISTRAL_7B = LanguageModel("mistral", 4096, 14336, 32, 32, 8, positions=32768, rope_theta=1e6)
YI_34B = LanguageModel("llama", 7168, 20480, 60, 56, 8, rope_theta=5e6)
QWEN2_7B = LanguageModel("qwen2", 3584, 18944, 28, 28, 4, positions=32768, eps=1e-6, rope_theta=1e6)

CLIP_224 = Tower("clip", "openai/clip-vit-large-patch14", 1024, 4096, 24, 16, 224, 14)
CLIP_336 = Tower("clip", "openai/clip-vit-large-patch14-336", 1024, 4096, 24, 16, 336, 14)
SIGLIP_384 = Tower("siglip", "google/siglip-so400m-patch14-384", 1152, 4304, 27, 16, 384, 14)
SIGLIP_448 = replace(SIGLIP_384, image_size=448, use_head=False)

ANYRES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

LLAVA_1_5 = Family("llava-v1.5-7b", "llava", LLAMA_7B, CLIP_336, "mlp2x_gelu", file_format="bin")
LLAVA_1_6 = replace(
    LLAVA_1_5, name="llava-v1.6-vicuna-7b", aspect_ratio="anyres", pinpoints=ANYRES,
    tower_inside=True, file_format="safetensors",
)  # fmt: skip
HF_1_5 = replace(
    LLAVA_1_5, name="llava-1.5-7b-hf", layout="hf", tokenizer="llama-hf", aspect_ratio=None,
    file_format="safetensors",
)  # fmt: skip
HF_1_6 = replace(HF_1_5, name="llava-v1.6-vicuna-7b-hf", pinpoints=ANYRES)
VILA_1_5 = Family(
    "vila1.5-3b", "vila", SHEARED_LLAMA_2_7B, SIGLIP_384, "mlp_downsample",
    dtype=torch.bfloat16, aspect_ratio="resize",
    extra=(("s2", False), ("s2_scales", "336,672,1008"), ("s2_max_split_size", 336)),
)  # fmt: skip
NVILA = Family(
    "nvila-8b-resize", "vila", QWEN2_7B, SIGLIP_448, "mlp_downsample_2x2_fix",
    vocabulary=151_643, tokenizer="qwen2", dtype=torch.bfloat16, aspect_ratio="resize",
    model_max_length=8192,
    extra=(
        ("min_tiles", 1), ("max_tiles", 12), ("video_max_tiles", 1), ("mm_use_im_patch_token", True)
    ),
)  # fmt: skip

for _family in (
    LLAVA_1_5,
    replace(LLAVA_1_5, name="llava-v1.5-13b", language=LLAMA_13B),
    # Of the time before `mm_projector_type`, `image_aspect_ratio` and plain `<image>`.
    replace(
        LLAVA_1_5,
        name="llava-v1",
        tower=CLIP_224,
        projector="linear",
        aspect_ratio=None,
        frame=True,
        language=replace(LLAMA_7B, positions=2048, eps=1e-6),
    ),
    LLAVA_1_6,
    replace(LLAVA_1_6, name="llava-v1.6-mistral-7b", language=MISTRAL_7B, dtype=torch.bfloat16),
    replace(
        LLAVA_1_6,
        name="llava-v1.6-34b",
        language=YI_34B,
        vocabulary=64000,
        tokenizer="yi",
        dtype=torch.bfloat16,
    ),
    HF_1_5,
    HF_1_6,
    replace(HF_1_6, name="llava-v1.6-mistral-7b-hf", language=MISTRAL_7B),
    replace(LLAVA_1_5, name="vila-7b", file_format="safetensors", dtype=torch.bfloat16),
    VILA_1_5,
    replace(
        VILA_1_5,
        name="llama-3-vila1.5-8b",
        language=LLAMA_3_8B,
        vocabulary=128_000,
        tokenizer="llama-3",
    ),
    replace(VILA_1_5, name="vila1.5-13b", language=LLAMA_13B),
    NVILA,
    replace(NVILA, name="nvila-lite-8b-resize", projector="mlp_downsample_3x3_fix"),
):
    FAMILIES.register(_family.name, _family)
