"""A language model's config.json -> its family's config class, by our own reading.

transformers' AutoConfig is not asked: it would follow `auto_map`, and LLaVA's `model_type` names
another model of transformers' own.
"""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig

from models.json_config import JsonConfig
from models.registry import Registry

FAMILIES: Registry[type[PreTrainedConfig]] = Registry("language model family")
FAMILIES.register("llama", LlamaConfig)

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
OPTIONAL = (
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip


def read_language_config(config: JsonConfig) -> PreTrainedConfig:
    """
    Raises:
        CheckpointError: a key is missing or of a wrong type, or the family is unknown.
    """
    family = FAMILIES[_family(config)]
    values: dict[str, Any] = {key: config.require(key, int) for key in REQUIRED}
    values |= {key: config.values[key] for key in OPTIONAL if key in config}
    # Upstream's default, where transformers' base class has another.
    values.setdefault("tie_word_embeddings", False)
    try:
        return family(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise config.problem("model_type", f"its config does not fit together: {error}") from error


def extend_context(config: JsonConfig) -> JsonConfig:
    """VILA's rule: a longer `model_max_length` than was pretrained scales rotary positions."""
    wanted = config.get("model_max_length", int, 0)
    pretrained = config.get("max_position_embeddings", int, 0)
    if not 0 < pretrained < wanted or "rope_scaling" in config or "rope_parameters" in config:
        return config
    scaling = {"rope_type": "linear", "factor": float(math.ceil(wanted / pretrained))}
    return JsonConfig({**config.values, "rope_scaling": scaling}, config.label)


def context_length(config: JsonConfig, language: PreTrainedConfig) -> int:
    """Tokens of prompt and answer, by the key that says it most plainly."""
    for key in ("max_sequence_length", "model_max_length"):
        if key in config:
            return config.require(key, int)
    return int(language.max_position_embeddings)


def _family(config: JsonConfig) -> str:
    """The architecture's name is plainer than LLaVA's model_type, which may be just "llava"."""
    architectures = config.get("architectures", list, [])
    names = " ".join([*map(str, architectures), config.get("model_type", str, "")]).lower()
    for family in ("mistral", "mixtral", "qwen2", "mpt", "gemma", "phi"):
        if family in names:
            return family
    return "llama" if "llama" in names or names.strip() == "llava" else names.strip()
