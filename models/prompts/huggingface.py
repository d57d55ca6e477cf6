"""Tokenizers in transformers' own formats (`tokenizer.json`, or vocabulary and merges)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from models.errors import CheckpointError
from models.prompts.tokenizer import SPACE, Tokenizer

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Everything about such a tokenizer is in its `tokenizer.json`."""
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A thin shell around transformers' class."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int] = (),
        placeholder: str | None = None,
    ) -> None:
        """
        Args:
            eos_token_ids: besides the tokenizer's own.
            placeholder: is made an added token, where it is none, with an id beyond the
                vocabulary.
        """
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._ids.values()) + 1
        self.bos_token_id = tokenizer.bos_token_id
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*own_eos, *eos_token_ids]))
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if placeholder is not None and placeholder not in added:
            # As VILA does. Its id stands for a picture's place and never reaches the model.
            tokenizer.add_tokens([AddedToken(placeholder, special=True, normalized=False)])
            self._ids = tokenizer.get_vocab()
            added.add(placeholder)
        self.added_tokens = frozenset(added)
        self._special_ids = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._is_byte_level = self._backend is not None and "ByteLevel" in _decoders(self._backend)

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer_class: str,
        eos_token_ids: Sequence[int] = (),
        placeholder: str | None = None,
    ) -> HuggingFaceTokenizer:
        """
        Args:
            tokenizer_class: as tokenizer_config.json names it, or "".
            eos_token_ids, placeholder: see the constructor.

        Raises:
            CheckpointError: transformers finds no tokenizer there. Code in the folder never runs.
        """
        try:
            # AutoTokenizer would look into config.json too, and complain of LLaVA's model_type.
            kind = PreTrainedTokenizerFast if tokenizer_class == GENERIC_CLASS else AutoTokenizer
            tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises nearly any type here
            raise CheckpointError(
                f"{folder.name} holds no tokenizer that can be read (tokenizer.model, "
                f"tokenizer.json, or vocabulary and merges): {type(error).__name__}"
            ) from error
        return cls(tokenizer, eos_token_ids, placeholder)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        if self._backend is not None:  # without transformers' checks, which cost five times as much
            text = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or token_id in self._special_ids:
            return b""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        assert isinstance(piece, str)
        if piece in self.added_tokens:
            return piece.encode()
        if self._is_byte_level:
            return bytes(_byte_of_character()[character] for character in piece)
        if byte := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(SPACE, " ").encode()

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)


def _decoders(backend: Backend) -> set[str]:
    """The types of all steps that decode."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in (state, *state.get("decoders", ()))}


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as a visible character: itself, or one from U+0100 on.

    Source: Radford et al., 2019 (GPT-2's vocabulary).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(0x100 + number): byte for number, byte in enumerate(hidden)},
    }
