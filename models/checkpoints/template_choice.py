"""Which conversation template a model was trained with. Hardly any config says so; names do."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedConfig

from models.prompts import find_chat_template

LLAMA_3_VOCABULARY = range(128_000, 129_000)

BY_NAME = (
    # VILA's own list. "llama-3" is also the beginning of "llama-30b", as TinyChat knows.
    (re.compile(r"nvila15b|vila-?1\.5-(3b|13b)"), "vicuna_v1"),
    (re.compile(r"vila-?1\.5-8b|^(?!.*30b).*llama-?3"), "llama_3"),
    (re.compile(r"vila-?1\.5-40b"), "hermes-2"),
    # LLaVA's.
    (re.compile(r"llama-?2.*chat|llava-llama-?2"), "llava_llama_2"),
    (re.compile(r"llava.*mi(s|x)tral.*hermes"), "chatml_direct"),
    (re.compile(r"llava.*mi(s|x)tral"), "mistral_instruct"),
    (re.compile(r"v1\.6-34b"), "chatml_direct"),
    # LLaVA's models of June 2023 ("llava-v1-0719", "llava-7b-v1"); v1.5 and later are Vicuna's.
    (re.compile(r"llava.*v1(?![.\d])"), "llava_v1"),
    (re.compile(r"llava.*v0(?![.\d])"), "llava_v0"),
    (re.compile(r"llava-?(v?1\.5|v1\.6-vicuna)|^vila-\d+b"), "vicuna_v1"),
)
"""LLaVA's and VILA's own rules, by parts of the lower-case name; the first match counts."""

BY_LANGUAGE = {"qwen2": "qwen", "mistral": "mistral_instruct"}
"""By the language model's family."""


def choose_template(
    name: str, language: PreTrainedConfig, tokenizer_path: Path | None = None
) -> str:
    """A name in `models.prompts`: by the model's name; or else the tokenizer's own, as with VILA;
    or else by the language model's family; or else "vicuna_v1".

    Args:
        name: the folder's name, or the last part of the Hub id.
        tokenizer_path: the folder that may hold a chat template.

    Raises:
        CheckpointError: a file that should hold a chat template cannot be read.
    """
    lower = name.lower()
    for pattern, template in BY_NAME:
        if pattern.search(lower):
            return template
    if language.model_type == "qwen2" and "vila" in lower:
        return "nvila"  # what NVILA's tokenizers have, too
    if tokenizer_path is not None and find_chat_template(tokenizer_path) is not None:
        return "tokenizer"
    if language.vocab_size in LLAMA_3_VOCABULARY:
        return "llama_3"
    return BY_LANGUAGE.get(language.model_type, "vicuna_v1")
