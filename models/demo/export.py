"""The trained network -> the checkpoint's files, in LLaVA's layout: 16-bit and 4-bit.

    config.json, model.safetensors                    language model and projector, fp16
    vision_tower/{config,preprocessor_config}.json, model.safetensors
    llava-demo-w4-g128-awq-v2.pt                      language model, llm-awq's second format
    tokenizer.json, tokenizer_config.json, generation_config.json

Nothing of it depends on this package: any code that reads LLaVA's layout can load it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.awq.formats.llm_awq_v2 import pack
from models.awq.quantize import quantize_rtn
from models.demo.batches import PREPROCESSING
from models.demo.network import Network, NetworkConfig
from models.demo.tokenizer import BEGIN, END, UNKNOWN, save_tokenizer

CONTEXT_LENGTH = 1024
GROUP_SIZE = 128
DTYPE = torch.float16
TOWER_FOLDER = "vision_tower"
QUANTIZED = (
    "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight",
    "up_proj.weight", "down_proj.weight",
)  # fmt: skip

Tensors = dict[str, Tensor]


def export_checkpoint(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes all files; those that are there already are replaced."""
    tower_folder = folder / TOWER_FOLDER
    tower_folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(DTYPE) for name, value in network.named_parameters()}
    language = _language(state)
    projector = {
        name.replace("projector.", "model.mm_projector."): value
        for name, value in state.items()
        if name.startswith("projector.")
    }
    _save(language | projector, folder / "model.safetensors")
    _save(_tower(state, network.config), tower_folder / "model.safetensors")
    torch.save(_quantized(language), folder / f"llava-demo-w4-g{GROUP_SIZE}-awq-v2.pt")
    save_tokenizer(tokenizer, folder, CONTEXT_LENGTH)
    _write_json(folder / "config.json", _config(network.config))
    _write_json(folder / "generation_config.json", {
        "bos_token_id": BEGIN, "eos_token_id": END, "do_sample": False,
    })  # fmt: skip
    _write_json(tower_folder / "config.json", _tower_config(network.config))
    _write_json(tower_folder / "preprocessor_config.json", _preprocessor_config())


def _language(state: Tensors) -> Tensors:
    apart = ("tower.", "projector.", "patch_head.", "role_heads.")
    return {
        name if name.startswith("lm_head.") else f"model.{name}": value
        for name, value in state.items()
        if not name.startswith(apart)
    }


def _quantized(language: Tensors) -> Tensors:
    """The layers' matrices in 4 bits, rounded to nearest; all the rest as it is."""
    out: Tensors = {}
    for name, value in language.items():
        if name.endswith(QUANTIZED):
            layer = name.removesuffix(".weight")
            packed = pack(quantize_rtn(value, GROUP_SIZE), DTYPE)
            out |= {f"{layer}.{suffix}": tensor for suffix, tensor in packed.items()}
        else:
            out[name] = value.clone()
    return out


def _tower(state: Tensors, config: NetworkConfig) -> Tensors:
    """CLIP's names. The last layer, which is never used, is zeros: it passes its input on."""
    prefix = "vision_model."
    own = {
        name.removeprefix("tower."): value
        for name, value in state.items()
        if name.startswith("tower.")
    }
    patch = config.patch_size
    out = {
        f"{prefix}embeddings.class_embedding": own.pop("class_embedding"),
        f"{prefix}embeddings.position_embedding.weight": own.pop("position_embedding"),
        f"{prefix}embeddings.patch_embedding.weight": own.pop("patch_embedding.weight").view(
            config.tower_hidden, 3, patch, patch
        ),
    }
    for name, value in own.items():
        inside = name.startswith("layers.")
        out[f"{prefix}encoder.{name}" if inside else f"{prefix}{name}"] = value
        if name.startswith("layers.0."):
            last = name.replace("layers.0.", f"layers.{config.tower_layers}.")
            out[f"{prefix}encoder.{last}"] = torch.zeros_like(value)
    out[f"{prefix}post_layernorm.weight"] = torch.ones(config.tower_hidden, dtype=DTYPE)
    out[f"{prefix}post_layernorm.bias"] = torch.zeros(config.tower_hidden, dtype=DTYPE)
    return out


def _config(config: NetworkConfig) -> dict[str, object]:
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "vocab_size": config.vocabulary, "hidden_size": config.hidden,
        "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.heads,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": BEGIN, "eos_token_id": END,
        "pad_token_id": UNKNOWN, "torch_dtype": str(DTYPE).removeprefix("torch."),
        "mm_vision_tower": TOWER_FOLDER, "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.tower_hidden, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": PREPROCESSING.mode,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    }  # fmt: skip


def _tower_config(config: NetworkConfig) -> dict[str, object]:
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
        "hidden_size": config.tower_hidden, "intermediate_size": config.tower_intermediate,
        "num_hidden_layers": config.tower_layers + 1,
        "num_attention_heads": config.tower_heads, "image_size": config.image_size,
        "patch_size": config.patch_size, "num_channels": 3, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": config.tower_hidden,
        "torch_dtype": str(DTYPE).removeprefix("torch."),
    }  # fmt: skip


def _preprocessor_config() -> dict[str, object]:
    side = PREPROCESSING.crop_size
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "size": {"shortest_edge": PREPROCESSING.size},
        "crop_size": {"height": side, "width": side}, "resample": PREPROCESSING.resample,
        "rescale_factor": PREPROCESSING.rescale_factor,
        "image_mean": PREPROCESSING.mean, "image_std": PREPROCESSING.std,
    }  # fmt: skip


def _save(tensors: Tensors, path: Path) -> None:
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
