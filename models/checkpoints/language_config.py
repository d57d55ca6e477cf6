"""A language model's config.json -> its family's config class, by our own reading.

transformers' AutoConfig is not asked: it would follow `auto_map`, and LLaVA's `model_type` names
another model of transformers' own.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from models.json_config import JsonConfig
from models.language.families import FAMILIES, sliding_window

logger = logging.getLogger(__name__)

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
COMMON = (
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
NULL_HAS_A_MEANING = frozenset({"sliding_window"})
"""Keys whose null is not the same as their absence: "none", where the default is a number."""

NAMED = re.compile(r"(?:llava_?)?(?P<family>.*?)(?:forcausallm)?")
"""The family in "LlavaMistralForCausalLM", "MistralForCausalLM" and "llava_mistral", lower-case."""
ALIASES = {"qwen": "qwen2"}
"""LLaVA's class for Qwen 2 is named without the number."""


def read_language_config(config: JsonConfig, required: Sequence[str] = SIZES) -> PreTrainedConfig:
    """
    Args:
        required: keys that must be there. transformers leaves out those that have the default of
            their family.

    Raises:
        CheckpointError: a key is missing or of a wrong type, or the family is unknown.
    """
    family = FAMILIES[_family(config)]
    values: dict[str, Any] = {
        key: config.require(key, int) for key in SIZES if key in required or key in config
    }
    for key in (*COMMON, *family.own_keys):
        if key in config or (key in NULL_HAS_A_MEANING and key in config.values):
            values[key] = config.values[key]
    # Upstream's default, where transformers' base class has another.
    values.setdefault("tie_word_embeddings", False)
    if values.get("hidden_act", "silu") != "silu":
        raise config.problem("hidden_act", "the MLP of these families is gated by silu only")
    try:
        return family.config(**values)
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
    """Tokens of prompt and answer, by the key that says it most plainly.

    Not more than a sliding window: up to there, it is the same as full attention.
    """
    length = int(language.max_position_embeddings)
    for key in ("max_sequence_length", "model_max_length"):
        if key in config:
            length = config.require(key, int)
            break
    window = sliding_window(language)
    if window is None or length <= window:
        return length
    logger.warning(
        "%s: sliding_window is %d; sliding attention is not supported, so the context is limited "
        "to the window, where it could be %d tokens",
        config.label, window, length,
    )  # fmt: skip
    return window


def _family(config: JsonConfig) -> str:
    """The architecture's name is plainer than LLaVA's model_type, which may be just "llava"."""
    architectures = config.get("architectures", list, [])
    for name in (*map(str, architectures), config.require("model_type", str)):
        match = NAMED.fullmatch(name.lower())
        if match and match["family"]:
            return ALIASES.get(match["family"], match["family"])
    return "llama"
