"""Which conversation template a model was trained with. No config says so; names do."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig

LLAMA_3_VOCABULARY = range(128_000, 129_000)

BY_NAME = (
    (re.compile(r"llama-?3(?!.*30b)|vila-?1\.5-8b"), "llama_3"),
    (re.compile(r"llama-?2.*chat|llava-llama-?2"), "llava_llama_2"),
    (re.compile(r"vila-?1\.5-40b|v1\.6-34b"), "chatml_direct"),
    # LLaVA's models of June 2023 ("llava-v1-0719", "llava-7b-v1"); v1.5 and later are Vicuna's.
    (re.compile(r"llava.*v1(?![.\d])"), "llava_v1"),
    (re.compile(r"llava.*v0(?![.\d])"), "llava_v0"),
)
"""LLaVA's and VILA's own rules, by parts of the lower-case name; the first match counts."""


def choose_template(name: str, language: PreTrainedConfig) -> str:
    """A name in `models.prompts`; "vicuna_v1" where nothing speaks for another."""
    for pattern, template in BY_NAME:
        if pattern.search(name.lower()):
            return template
    if language.vocab_size in LLAMA_3_VOCABULARY:
        return "llama_3"
    return "vicuna_v1"
