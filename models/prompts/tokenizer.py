"""What the engine needs of a tokenizer, and which kind a checkpoint's folder holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CheckpointError
from models.json_config import JsonConfig

if TYPE_CHECKING:
    from models.checkpoints.spec import Tokenization

IMAGE_PLACEHOLDER = "<image>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's visible space."""
SENTENCEPIECE_FILE = "tokenizer.model"
SENTENCEPIECE_CLASSES = ("", "LlamaTokenizer", "LlamaTokenizerFast")
"""Classes whose `tokenizer.model` is a SentencePiece model with Llama's added-token rules."""


class Tokenizer(ABC):
    """Safe to use from several threads at once.

    Attributes:
        vocab_size: one more than the largest token id, added tokens included.
        bos_token_id: the token that `encode` puts first, where it puts one.
        eos_token_ids: any of these ends an answer.
        added_tokens: names of the tokens that are found in a text before anything else.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    added_tokens: frozenset[str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text that stands by itself: with the beginning-of-sequence token, where
        the model was trained with one. Added tokens in the text ("</s>") become themselves."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that are in no vocabulary are passed over. Bytes that make
        no character are U+FFFD."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for inside a text. Nothing for special tokens, and for ids that
        are in no vocabulary. A space at the very beginning of a text may be dropped by `decode`."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact name."""


def load_tokenizer(folder: Path, tokenization: Tokenization = "pieces") -> Tokenizer:
    """The one that the model was trained with.

    Args:
        folder: the tokenizer's files.
        tokenization: as in `PromptSpec`. With "pieces": SentencePiece where there is a
            `tokenizer.model`, since LLaVA's models were trained with it and transformers' fast
            conversion gives other ids; AutoTokenizer otherwise. With "whole": always
            AutoTokenizer, in which `<image>` is then an added token.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read.
    """
    config = _optional(folder / "tokenizer_config.json")
    eos = _generation_eos(folder)
    kind = config.get("tokenizer_class", str, "")
    has_model = (folder / SENTENCEPIECE_FILE).is_file()
    if tokenization == "pieces" and has_model and kind in SENTENCEPIECE_CLASSES:
        from models.prompts.sentencepiece_ import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder, config, eos)
    from models.prompts.huggingface import HuggingFaceTokenizer

    placeholder = IMAGE_PLACEHOLDER if tokenization == "whole" else None
    return HuggingFaceTokenizer.load(folder, kind, eos, placeholder)


def _optional(path: Path) -> JsonConfig:
    return JsonConfig.read(path, path.name) if path.is_file() else JsonConfig({}, path.name)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """Llama-3's models name their second end of turn in generation_config.json only."""
    config = _optional(folder / "generation_config.json")
    value = config.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(
            f"{config.label}: eos_token_id is {value!r}; it must be a token id, or a list of them"
        )
    return tuple(ids)
