"""Names and shapes of a family's tensors, component by component, and their random values.

Towers and language models are listed by transformers' own classes, built without memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from models.awq.quantized_weight import QuantizedWeight
from models.checkpoints.synthesis.family import Family
from models.checkpoints.synthesis.weights import RandomWeights
from models.errors import ConfigurationError
from models.registry import Registry

LANGUAGE_CLASSES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
"""Config and model."""
HEAD_GAIN = 3.0
"""Times the usual spread of the output layer: answers that hang on a rounding are rarer."""
VISUAL_GAIN = 2.0
"""Times the usual spread of a projector's last layer: pictures weigh as much as words."""
EMBEDDING_STD = 1.0
SMALL_STD = 0.1
"""Of biases, and of norms around 1."""

Item: TypeAlias = tuple[str, Tensor | QuantizedWeight]


@dataclass(frozen=True)
class Parameter:
    """
    Attributes:
        name: the component's own: "model.layers.0.mlp.up_proj.weight", "encoder.layers.0...".
        quantizable: AWQ holds it in 4 bits.
    """

    name: str
    shape: tuple[int, ...]
    quantizable: bool = False


@cache
def language_parameters(family: Family, vocab_size: int) -> tuple[Parameter, ...]:
    config_class, model_class = LANGUAGE_CLASSES[family.language.kind]
    with init_empty_weights():
        model = model_class(config_class(**language_values(family, vocab_size)))
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    return tuple(
        Parameter(name, tuple(value.shape), name in linears)
        for name, value in model.named_parameters()
    )


def language_values(family: Family, vocab_size: int) -> dict[str, object]:
    """The language model's part of a config.json."""
    language = family.language
    values: dict[str, object] = {
        "vocab_size": vocab_size, "hidden_size": language.hidden,
        "intermediate_size": language.intermediate, "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads, "num_key_value_heads": language.kv_heads,
        "hidden_act": "silu", "max_position_embeddings": language.positions,
        "rms_norm_eps": language.eps, "rope_theta": language.rope_theta,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if language.kind == "llama":
        values |= {"attention_bias": language.bias, "rope_scaling": None}
    if language.kind == "mistral":
        values |= {"sliding_window": None}
    if language.kind == "qwen2":
        values |= {"use_sliding_window": False, "max_window_layers": language.layers}
    return values


@cache
def tower_parameters(family: Family) -> tuple[Parameter, ...]:
    """Under the names behind `vision_model.`."""
    clip = family.tower.kind == "clip"
    model_class: type[PreTrainedModel] = CLIPVisionModel if clip else SiglipVisionModel
    with init_empty_weights():
        model = model_class(tower_config(family))
    return tuple(
        Parameter(name.removeprefix("vision_model."), tuple(value.shape))
        for name, value in model.named_parameters()
    )


def tower_config(family: Family) -> CLIPVisionConfig | SiglipVisionConfig:
    tower = family.tower
    values: dict[str, Any] = {
        "hidden_size": tower.hidden, "intermediate_size": tower.intermediate,
        "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
        "image_size": tower.image_size, "patch_size": tower.patch_size,
    }  # fmt: skip
    if tower.kind == "clip":
        return CLIPVisionConfig(**values)
    config = SiglipVisionConfig(**values)
    config.vision_use_head = tower.use_head
    return config


def projector_parameters(family: Family) -> list[Parameter]:
    """Under sequential names: "0.weight" is the first module's."""
    return PROJECTORS[family.projector](family.tower.hidden, family.language.hidden)


def draw_language(
    family: Family, vocab_size: int, weights: RandomWeights, quantized: bool
) -> Iterator[Item]:
    """
    Args:
        quantized: AWQ's layers as `QuantizedWeight`s, under their names without ".weight";
            otherwise what those stand for, in float32.
    """
    for parameter in language_parameters(family, vocab_size):
        name, shape = parameter.name, parameter.shape
        if parameter.quantizable:
            layer = name.removesuffix(".weight")
            weight = weights.quantized(layer, *shape)
            yield (layer, weight) if quantized else (name, weight.dequantize(torch.float32))
        elif name == "model.embed_tokens.weight":
            yield name, weights.dense(name, shape, EMBEDDING_STD)
        else:
            gain = HEAD_GAIN if name == "lm_head.weight" else 1.0
            yield name, _draw(parameter, name, weights, gain)


def draw_tower(family: Family, weights: RandomWeights) -> Iterator[Item]:
    for parameter in tower_parameters(family):
        yield parameter.name, _draw(parameter, f"tower.{parameter.name}", weights)


def draw_projector(family: Family, weights: RandomWeights) -> Iterator[Item]:
    parameters = projector_parameters(family)
    last = parameters[-2].name
    for parameter in parameters:
        gain = VISUAL_GAIN if parameter.name == last else 1.0
        yield parameter.name, _draw(parameter, f"projector.{parameter.name}", weights, gain)


def draw_newline(family: Family, weights: RandomWeights) -> Tensor:
    """Behind each row of an "anyres" picture."""
    return weights.dense("image_newline", (family.language.hidden,), EMBEDDING_STD)


def _draw(parameter: Parameter, key: str, weights: RandomWeights, gain: float = 1.0) -> Tensor:
    shape = parameter.shape
    if len(shape) > 1:
        return weights.dense(key, shape, gain / math.prod(shape[1:]) ** 0.5)
    is_norm = parameter.name.endswith("weight")
    return weights.dense(key, shape, SMALL_STD, mean=1.0 if is_norm else 0.0)


def _linear(index: int, n: int, k: int) -> list[Parameter]:
    return [Parameter(f"{index}.weight", (n, k)), Parameter(f"{index}.bias", (n,))]


def _norm(index: int, size: int) -> list[Parameter]:
    return [Parameter(f"{index}.weight", (size,)), Parameter(f"{index}.bias", (size,))]


def _downsample_2x2(inner: int, outer: int) -> list[Parameter]:
    return [*_norm(1, 4 * inner), *_linear(2, outer, 4 * inner), *_linear(4, outer, outer)]


def _downsample_3x3(inner: int, outer: int) -> list[Parameter]:
    return [
        *_norm(1, 9 * inner), *_linear(2, 3 * inner, 9 * inner), *_norm(4, 3 * inner),
        *_linear(5, outer, 3 * inner), *_linear(7, outer, outer),
    ]  # fmt: skip


PROJECTORS: Registry[Callable[[int, int], list[Parameter]]] = Registry(
    "projector", ConfigurationError
)
"""(tower's width, language model's width) -> parameters."""
PROJECTORS.register("linear", lambda inner, outer: _linear(0, outer, inner))
PROJECTORS.register(
    "mlp2x_gelu", lambda inner, outer: [*_linear(0, outer, inner), *_linear(2, outer, outer)]
)
PROJECTORS.register("mlp_downsample", _downsample_2x2)
PROJECTORS.register("mlp_downsample_2x2_fix", _downsample_2x2)
PROJECTORS.register("mlp_downsample_3x3_fix", _downsample_3x3)
