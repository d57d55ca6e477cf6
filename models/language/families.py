"""What is peculiar to each family of language models. The rest is `decoder`'s, for all of them.

A new family of the same architecture is one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from models.registry import Registry


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        config: transformers' class, whose defaults hold for keys that a config.json leaves out.
        own_keys: of config.json, that not every family has.
        qkv_bias: q, k and v have biases by definition, with no key that says so.
    """

    config: type[PreTrainedConfig]
    own_keys: tuple[str, ...] = ()
    qkv_bias: bool = False


FAMILIES: Registry[Family] = Registry("language model family")
FAMILIES.register("llama", Family(LlamaConfig, ("attention_bias", "mlp_bias")))
FAMILIES.register("mistral", Family(MistralConfig, ("sliding_window",)))
FAMILIES.register(
    "qwen2",
    Family(
        Qwen2Config,
        ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        qkv_bias=True,
    ),
)


class AttentionBias(NamedTuple):
    """Which attention projections carry a bias."""

    qkv: bool
    output: bool


def attention_bias(config: PreTrainedConfig) -> AttentionBias:
    """By the family's definition, or as the config says."""
    by_config = bool(getattr(config, "attention_bias", False))
    by_definition = FAMILIES[config.model_type].qkv_bias
    return AttentionBias(qkv=by_definition or by_config, output=by_config)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many tokens, itself included, a token may look back upon; None for all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)
