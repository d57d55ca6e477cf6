"""The JSON files of each layout, as the released checkpoints have them.

Compared with what others have quoted of released files: VILA1.5-3b and NVILA-8B (TensorRT-LLM's
tests of modeling_vila), llava-v1.6-vicuna-7b (PaddleMIX's tests of llava_llama), llava-v1.5-7b and
llava-hf/llava-1.5-7b-hf (logs of programs that print their model's config), and LLaVAR, which is of
LLaVA-v1's time. Of VILA-1.0, LLaVA-v1.6's Mistral and 34B, and NVILA-Lite none was found.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from models.checkpoints.synthesis.components import LANGUAGE_CLASSES, language_values, tower_config
from models.checkpoints.synthesis.family import Family
from models.checkpoints.synthesis.tokenizers import WrittenTokenizer

Json: TypeAlias = dict[str, Any]

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIGLIP_MEAN = SIGLIP_STD = [0.5, 0.5, 0.5]
BICUBIC = 3
RESCALE_FACTOR = 1 / 255
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
TOWER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
DEFAULTED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rope_theta", "hidden_act", "tie_word_embeddings", "attention_bias",
    "rope_scaling",
)  # fmt: skip
"""Keys that llava-hf's text_config leaves out where they are the class's defaults."""


def llava(family: Family, tokenizer: WrittenTokenizer) -> Json:
    kind = family.language.kind
    # What LLaVA's Llamas call themselves is another model to transformers.
    model_type = "llava" if kind == "llama" else f"llava_{kind}"
    config = {
        **language_values(family, tokenizer.vocab_size), **_ends(tokenizer),
        "architectures": [f"Llava{CLASSES[kind]}ForCausalLM"], "model_type": model_type,
        "mm_vision_tower": family.tower.name, "mm_hidden_size": family.tower.hidden,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": family.frame, "use_mm_proj": True, "use_cache": True,
        "tokenizer_padding_side": "right", "torch_dtype": _name(family.dtype), **dict(family.extra),
    }  # fmt: skip
    if not family.frame:  # the older ones leave these to their defaults
        config |= {"mm_projector_type": family.projector, "mm_use_im_patch_token": False}
    if family.aspect_ratio is not None:
        config |= {"image_aspect_ratio": family.aspect_ratio}
    if family.pinpoints:
        config |= {
            "mm_patch_merge_type": "spatial_unpad", "image_crop_resolution": 224,
            "image_split_resolution": 224, "image_grid_pinpoints": _pinpoints(family),
        }  # fmt: skip
    return config


def vila(family: Family, tokenizer: WrittenTokenizer) -> Json:
    """The outermost of the four. Its paths are those of the machine that trained the model."""
    nested = vila_language(family, tokenizer)
    return {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama",
        "llm_cfg": {**nested, "_name_or_path": "./elsewhere/llm"},
        "vision_tower_cfg": {**tower(family), "_name_or_path": "./elsewhere/vision_tower"},
        "mm_projector_cfg": {**vila_projector(family), "_name_or_path": "./elsewhere/mm_projector"},
        "hidden_size": family.language.hidden, "mm_hidden_size": family.tower.hidden,
        "image_aspect_ratio": family.aspect_ratio, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": family.frame,
        "mm_use_im_patch_token": False, "num_video_frames": 8, "resume_path": "./elsewhere",
        **dict(family.extra),
    }  # fmt: skip


def vila_language(family: Family, tokenizer: WrittenTokenizer) -> Json:
    kind = family.language.kind
    return {
        **language_values(family, tokenizer.vocab_size), **_ends(tokenizer),
        "architectures": [f"{CLASSES[kind]}ForCausalLM"], "model_type": kind,
        "model_max_length": family.model_max_length,
        "tokenizer_model_max_length": family.model_max_length, "tokenizer_padding_side": "right",
        "torch_dtype": _name(family.dtype), "use_cache": True,
    }  # fmt: skip


def vila_projector(family: Family) -> Json:
    return {
        "architectures": ["MultimodalProjector"], "model_type": "v2l_projector",
        "mm_projector_type": family.projector, "torch_dtype": _name(family.dtype),
    }  # fmt: skip


def hf(family: Family, tokenizer: WrittenTokenizer) -> Json:
    kind = family.language.kind
    defaults = LANGUAGE_CLASSES[kind][0]()
    text = {
        key: value
        for key, value in language_values(family, tokenizer.vocab_size).items()
        if key not in DEFAULTED or getattr(defaults, key, value) != value
    }
    text |= {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"], "model_type": kind,
        "torch_dtype": _name(family.dtype),
    }  # fmt: skip
    model = "llava_next" if family.pinpoints else "llava"
    config = {
        "architectures": [f"{_hf_class(family)}ForConditionalGeneration"], "model_type": model,
        "ignore_index": -100, "image_token_index": tokenizer.image,
        "pad_token_id": tokenizer.pad, "projector_hidden_act": "gelu", "text_config": text,
        "tie_word_embeddings": False, "torch_dtype": _name(family.dtype),
        "vision_config": tower(family), "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    if family.pinpoints:
        config |= {
            "image_grid_pinpoints": _pinpoints(family), "use_image_newline_parameter": True,
        }  # fmt: skip
    return config


def hf_processor(family: Family) -> Json:
    return {
        "processor_class": f"{_hf_class(family)}Processor", "image_token": "<image>",
        "patch_size": family.tower.patch_size, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip


def hf_chat_template(family: Family) -> Json:
    """A message's content is a list: pictures first, then texts."""
    content = (
        "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\\n' }}"
        "{% endfor %}{% for item in message['content'] if item['type'] == 'text' %}"
        "{{ item['text'] }}{% endfor %}"
    )
    if family.language.kind == "mistral":
        turn = (
            "{% if message['role'] == 'user' %}{{ '[INST] ' }}" + content + "{{ ' [/INST]' }}"
            "{% else %}{{ ' ' }}" + content + "{{ '</s>' }}{% endif %}"
        )
        reply = ""
    else:
        turn = "{{ message['role'].upper() + ': ' }}" + content + "{{ ' ' }}"
        reply = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    return {"chat_template": "{% for message in messages %}" + turn + "{% endfor %}" + reply}


def generation(tokenizer: WrittenTokenizer) -> Json:
    ends = list(tokenizer.generation_eos)
    eos = ends[0] if len(ends) == 1 else ends
    return {
        "bos_token_id": tokenizer.bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad,
    }  # fmt: skip


def tower(family: Family) -> Json:
    config = tower_config(family)
    name = "CLIPVisionModel" if family.tower.kind == "clip" else "SiglipVisionModel"
    values = {
        "architectures": [name], "model_type": config.model_type,
        **{key: getattr(config, key) for key in TOWER_KEYS}, "torch_dtype": _name(family.dtype),
    }  # fmt: skip
    if not family.tower.use_head:
        values |= {"vision_use_head": False}
    return values


def preprocessor(family: Family) -> Json:
    side = family.tower.image_size
    square = {"height": side, "width": side}
    values: Json = {
        "do_normalize": True, "do_rescale": True, "do_resize": True,
        "rescale_factor": RESCALE_FACTOR, "resample": BICUBIC,
    }  # fmt: skip
    if family.tower.kind == "siglip":
        return {
            **values, "image_processor_type": "SiglipImageProcessor", "size": square,
            "image_mean": SIGLIP_MEAN, "image_std": SIGLIP_STD,
        }  # fmt: skip
    values |= {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
        "do_convert_rgb": True, "size": {"shortest_edge": side}, "crop_size": square,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    if family.layout == "hf":
        values |= {"processor_class": f"{_hf_class(family)}Processor"}
    if family.layout == "hf" and family.pinpoints:
        values |= {
            "image_processor_type": "LlavaNextImageProcessor", "aspect_ratio_setting": "anyres",
            "do_pad": True, "image_grid_pinpoints": _pinpoints(family),
        }  # fmt: skip
    return values


def _hf_class(family: Family) -> str:
    return "LlavaNext" if family.pinpoints else "Llava"


def _pinpoints(family: Family) -> list[list[int]]:
    return [list(size) for size in family.pinpoints]


def _ends(tokenizer: WrittenTokenizer) -> Json:
    return {
        "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
