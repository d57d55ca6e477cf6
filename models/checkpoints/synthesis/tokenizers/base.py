"""What a kind of tokenizer does here: write its files, and count its ids."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WrittenTokenizer:
    """
    Attributes:
        vocab_size: rows of the embedding, as the family's models have them.
        bos, eos, pad: token ids; `bos` is None where texts have no beginning.
        image: the id of `<image>`, where the tokenizer has one.
        generation_eos: what generation_config.json says ends an answer.
    """

    vocab_size: int
    bos: int | None
    eos: int
    pad: int | None
    image: int | None = None
    generation_eos: tuple[int, ...] = ()


class TokenizerKind(ABC):
    @abstractmethod
    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        """
        Args:
            vocabulary: size of the base vocabulary, added tokens apart.
            framed: add `<im_patch>`, `<im_start>` and `<im_end>`.
        """


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def added_token(content: str, special: bool = True) -> dict[str, object]:
    """An entry of `added_tokens_decoder`."""
    return {
        "content": content, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": special,
    }  # fmt: skip
