"""Tokenizers in the files that each family has them in; vocabularies of the real sizes."""

from __future__ import annotations

from models.checkpoints.synthesis.tokenizers.base import TokenizerKind, WrittenTokenizer
from models.checkpoints.synthesis.tokenizers.byte_level import Llama3Kind, Qwen2Kind
from models.checkpoints.synthesis.tokenizers.llama import LlamaHfKind, LlamaKind, YiKind
from models.errors import ConfigurationError
from models.registry import Registry

TOKENIZERS: Registry[TokenizerKind] = Registry("tokenizer kind", ConfigurationError)
TOKENIZERS.register("llama", LlamaKind())
TOKENIZERS.register("llama-hf", LlamaHfKind())
TOKENIZERS.register("yi", YiKind())
TOKENIZERS.register("llama-3", Llama3Kind())
TOKENIZERS.register("qwen2", Qwen2Kind())

__all__ = ["TOKENIZERS", "TokenizerKind", "WrittenTokenizer"]
