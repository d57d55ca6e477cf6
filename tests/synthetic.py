"""Tiny checkpoints of random weights, in the exact layouts, names and dtypes of released ones.

    write_tiny_llava(tmp_path / "llava-tiny")     # W16A16 and W4A16 both load from that folder
    write_tiny_vila(tmp_path / "vila1.5-tiny")

The 16-bit language model's linears hold the values of the 4-bit ones, so both precisions answer
alike up to rounding. Weights are drawn so that greedy answers vary with the prompt and picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from models.awq.formats.llm_awq_v2 import pack
from models.awq.quantize import quantize_rtn
from models.awq.quantized_weight import QuantizedWeight

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOWER_HIDDEN = 64

Tensors = dict[str, Tensor]


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
    context_length: int = 1024,
    file_format: str = "safetensors",
    shards: int = 1,
) -> Path:
    """The flat layout of LLaVA-1.5: a CLIP tower (32 x 32, patches of 8: 16 tokens), a Llama.

    Args:
        awq: also write `<folder's name>-w4-g<group>-awq-v2.pt`, which holds the language model.
        awq_only: leave the language model's 16-bit tensors out.
        awq_holds_all: put projector and tower into the AWQ file too, and nowhere else.
        projector: "mlp2x_gelu" or "linear".
        tower_inside: the tower's weights lie in the checkpoint; otherwise in its sub-folder
            "clip-tiny", as `vision_model.*`. Its two JSON files lie there in both cases.
        bias: of the attention's four projections (`attention_bias`).
        file_format: "safetensors" or "bin".
        shards: how many files the weights are cut into, with an index if more than one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    vocab = _write_tokenizer(folder)
    language = _language_config(
        vocab, hidden, intermediate, layers, heads, kv_heads, bias, context_length
    )
    quantized, others = _language_tensors(language, generator, group_size, dtype)
    linears = {f"{name}.weight": weight.dequantize(dtype) for name, weight in quantized.items()}
    tower_config = clip_config()
    tower = _tower_tensors(CLIPVisionModel(tower_config), generator, dtype)
    visual = _llava_projector(projector, hidden, generator, dtype)
    inner = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
    if awq:
        tensors = {**_packed(quantized, dtype), **others}
        if awq_holds_all:
            tensors |= visual | inner
        name = f"{folder.name}-w4-g{group_size}-awq-v2.pt"
        torch.save(tensors, folder / name)
    kept: Tensors = {} if awq_only else {**linears, **others}
    if not awq_holds_all:
        kept |= visual | (inner if tower_inside else {})
    if kept:
        write_tensors(folder, kept, file_format, shards)

    tower_folder = folder / "clip-tiny"
    tower_folder.mkdir(exist_ok=True)
    _write_json(tower_folder / "config.json", {
        "model_type": "clip_vision_model", **_tower_json(tower_config),
    })  # fmt: skip
    _write_json(tower_folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "do_normalize": True, "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    })  # fmt: skip
    if not tower_inside and not awq_holds_all:
        write_tensors(tower_folder, tower, file_format)
    config = {
        **language,
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
        "mm_vision_tower": "clip-tiny", "mm_projector_type": projector,
        "mm_hidden_size": TOWER_HIDDEN, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": image_aspect_ratio,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if image_aspect_ratio is None:
        del config["image_aspect_ratio"]
    _write_json(folder / "config.json", config)
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
    context_length: int = 1024,
    file_format: str = "safetensors",
    shards: int = 1,
) -> Path:
    """VILA-1.5's layout: `llm/`, `vision_tower/` and `mm_projector/`.

    The SigLIP tower reads 28 x 28 in patches of 4: a grid of 7 x 7, which `mlp_downsample` pads
    to 8 x 8 and joins to 16 tokens. Arguments as in `write_tiny_llava`; with `awq_only` a stale
    index is left in `llm/`, as in the released AWQ checkpoints.
    """
    generator = torch.Generator().manual_seed(seed)
    llm, vision, projector = (folder / name for name in ("llm", "vision_tower", "mm_projector"))
    for part in (llm, vision, projector):
        part.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(llm)
    language = _language_config(
        vocab, hidden, intermediate, layers, heads, kv_heads, False, context_length
    )
    quantized, others = _language_tensors(language, generator, group_size, dtype)
    linears = {f"{name}.weight": weight.dequantize(dtype) for name, weight in quantized.items()}
    _write_json(llm / "config.json", {
        **language, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "model_max_length": context_length, "tokenizer_padding_side": "right",
    })  # fmt: skip
    if awq:
        tensors = {**_packed(quantized, dtype), **others}
        torch.save(tensors, llm / f"{folder.name}-w4-g{group_size}-awq-v2.pt")
    if awq_only:
        absent = "model-00001-of-00002.safetensors"
        weight_map = dict.fromkeys([*linears, *others], absent)
        _write_json(llm / "model.safetensors.index.json", {"weight_map": weight_map})
    else:
        write_tensors(llm, {**linears, **others}, file_format, shards)

    tower_config = siglip_config()
    tower = _tower_tensors(SiglipVisionModel(tower_config), generator, dtype)
    write_tensors(vision, tower, file_format)
    _write_json(vision / "config.json", {
        "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
        **_tower_json(tower_config),
    })  # fmt: skip
    _write_json(vision / "preprocessor_config.json", {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "size": {"height": 28, "width": 28}, "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip
    write_tensors(projector, vila_projector(hidden, generator, dtype), file_format)
    _write_json(projector / "config.json", {
        "architectures": ["MultimodalProjector"], "model_type": "v2l_projector",
        "mm_projector_type": "mlp_downsample",
    })  # fmt: skip
    _write_json(folder / "config.json", {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama",
        "llm_cfg": {**language, "model_type": "llama", "_name_or_path": "./elsewhere/llm"},
        "vision_tower_cfg": {"model_type": "siglip_vision_model", **_tower_json(tower_config)},
        "mm_projector_cfg": {
            "model_type": "v2l_projector", "mm_projector_type": "mlp_downsample",
        },
        "hidden_size": hidden, "mm_hidden_size": TOWER_HIDDEN, "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "num_video_frames": 8, "resume_path": "./elsewhere",
        "s2": False, "s2_scales": "336,672,1008", "s2_max_split_size": 336,
    })  # fmt: skip
    return folder


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=TOWER_HIDDEN, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, image_size=32, patch_size=8, projection_dim=32,
    )  # fmt: skip


def siglip_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=TOWER_HIDDEN, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, image_size=28, patch_size=4, hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )  # fmt: skip


def vila_projector(hidden: int, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    """[downsample, LayerNorm(4C) = 1, Linear = 2, GELU, Linear = 4]."""
    wide = 4 * TOWER_HIDDEN
    return {
        "layers.1.weight": _norm(wide, generator, dtype),
        "layers.1.bias": _bias(wide, generator, dtype),
        "layers.2.weight": _linear(hidden, wide, generator, dtype),
        "layers.2.bias": _bias(hidden, generator, dtype),
        "layers.4.weight": _linear(hidden, hidden, generator, dtype),
        "layers.4.bias": _bias(hidden, generator, dtype),
    }


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    file_format: str = "safetensors",
    shards: int = 1,
) -> None:
    """Under transformers' file names, with an index where there are several shards."""
    stem, suffix = {
        "safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin"),
    }[file_format]  # fmt: skip
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        number = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        path = folder / f"{stem}{number}.{suffix}"
        weight_map.update(dict.fromkeys(part, path.name))
        if file_format == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)
    if shards > 1:
        _write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def read_tensors(path: Path) -> Tensors:
    """All tensors of one file, `.safetensors` or torch's."""
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: Tensors = torch.load(path, weights_only=True)
    return tensors


def rewrite_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Lets `change` alter the dict of a file's tensors, and writes it back."""
    tensors = read_tensors(path)
    change(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def rewrite_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `None` removes them."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    _write_json(path, {key: value for key, value in values.items() if value is not None})


def awq_file(folder: Path) -> Path:
    """The one file of 4-bit weights in a tiny checkpoint."""
    (path,) = folder.rglob("*-awq-v2.pt")
    return path


def _language_config(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int,
    bias: bool, context_length: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "attention_bias": bias, "hidden_act": "silu",
        "max_position_embeddings": context_length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _language_tensors(
    config: dict[str, Any],
    generator: torch.Generator,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[dict[str, QuantizedWeight], Tensors]:
    """Linears inside the layers, and all the rest, biases included."""
    hidden, inner, vocab = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    quantized: dict[str, QuantizedWeight] = {}
    others: Tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator).to(dtype),
        "model.norm.weight": _norm(hidden, generator, dtype),
        # Three times the usual spread: answers that hang on a rounding are rarer.
        "lm_head.weight": 3 * _linear(vocab, hidden, generator, dtype),
    }
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            others[f"{prefix}{norm}.weight"] = _norm(hidden, generator, dtype)
        for name, (n, k) in shapes.items():
            weight = _linear(n, k, generator, dtype)
            quantized[f"{prefix}{name}"] = quantize_rtn(weight, group_size)
            if config["attention_bias"] and name.startswith("self_attn."):
                others[f"{prefix}{name}.bias"] = _bias(n, generator, dtype)
    return quantized, others


def _packed(quantized: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> Tensors:
    return {
        f"{name}.{suffix}": tensor
        for name, weight in quantized.items()
        for suffix, tensor in pack(weight, dtype).items()
    }


def _llava_projector(
    kind: str, hidden: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensors:
    prefix = "model.mm_projector"
    if kind == "linear":
        return {
            f"{prefix}.weight": _linear(hidden, TOWER_HIDDEN, generator, dtype),
            f"{prefix}.bias": _bias(hidden, generator, dtype),
        }
    return {
        f"{prefix}.0.weight": _linear(hidden, TOWER_HIDDEN, generator, dtype),
        f"{prefix}.0.bias": _bias(hidden, generator, dtype),
        f"{prefix}.2.weight": 2 * _linear(hidden, hidden, generator, dtype),
        f"{prefix}.2.bias": _bias(hidden, generator, dtype),
    }


def _tower_tensors(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Every tensor of a tower under its released name, `vision_model.*`."""
    out: Tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        short = name.removeprefix("vision_model.")
        if value.ndim == 1 and name.endswith("weight"):
            drawn = _norm(value.shape[0], generator, dtype)
        elif value.ndim == 1:
            drawn = _bias(value.shape[0], generator, dtype)
        else:
            fan_in = value[0].numel()
            drawn = (torch.randn(value.shape, generator=generator) / fan_in**0.5).to(dtype)
        out[f"vision_model.{short}"] = drawn
    return out


def _tower_json(config: CLIPVisionConfig | SiglipVisionConfig) -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size", "hidden_act", "layer_norm_eps", "num_channels",
    )  # fmt: skip
    return {key: getattr(config, key) for key in keys}


def _linear(n: int, k: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)


def _norm(size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)


def _bias(size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (0.1 * torch.randn(size, generator=generator)).to(dtype)


TOKENIZER_TEXT = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives
helpful, detailed, and polite answers to the user's questions. USER: What is shown in this image?
ASSISTANT: The image shows a red square to the left of a blue circle. How many objects are there?
There are three: one green triangle, one yellow star and one large orange ring. Describe the
picture in detail. Where is the small black cross? It is at the top right. Which number is written
here? The number is 42. Is there a dog in the photograph? No, there is no dog; a cat sleeps on the
sofa, next to a window through which you can see the street, the trees and a few parked cars.
Thank you! You are welcome. Could you explain why the sky is blue? Sunlight is scattered by the
air, and short wavelengths are scattered more than long ones. Write a short poem about the sea.
The sea is wide, the sea is deep, it sings the sailors all to sleep. Translate "good morning".
"""


@cache
def tokenizer_model(vocab_size: int = 400) -> bytes:
    """A sentencepiece model in Llama's settings: BPE, byte fallback, single digits."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.strip().split("\n")),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        split_digits=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _write_tokenizer(folder: Path) -> int:
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    _write_json(folder / "tokenizer_config.json", {
        **special, "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "legacy": True,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 1024, "sp_model_kwargs": {},
    })  # fmt: skip
    return 400


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
