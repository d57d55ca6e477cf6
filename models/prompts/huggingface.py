"""Tokenizers in transformers' own formats (`tokenizer.json`, or vocabulary and merges)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.errors import CheckpointError
from models.prompts.tokenizer import Tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A thin shell around transformers' class."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._ids.values()) + 1
        self.bos_token_id = tokenizer.bos_token_id
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*own_eos, *eos_token_ids]))

    @classmethod
    def load(cls, folder: Path, eos_token_ids: Sequence[int] = ()) -> HuggingFaceTokenizer:
        """
        Raises:
            CheckpointError: transformers finds no tokenizer there. Code in the folder never runs.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises nearly any type here
            raise CheckpointError(
                f"{folder.name} holds no tokenizer that can be read (tokenizer.model, "
                f"tokenizer.json, or vocabulary and merges): {type(error).__name__}"
            ) from error
        return cls(tokenizer, eos_token_ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        text = self._tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)
