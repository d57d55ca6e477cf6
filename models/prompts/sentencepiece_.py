"""Llama's tokenizer from its `tokenizer.model`, as transformers' slow `LlamaTokenizer` had it.

transformers 5 has no slow Llama tokenizer any more, and LLaVA's models were trained and served
with it; the fast conversion gives other ids around added tokens, newlines and double spaces.

A text is cut at added tokens ("</s>"), and the rest is encoded piece by piece. There are two
behaviours, and `legacy` in tokenizer_config.json says with which a model was trained:

    legacy      every piece gets SentencePiece's dummy prefix (a leading space), so that
                "Hi</s>there" has one before "there" too; none where the model itself was trained
                without (Yi)
    not legacy  only the text as a whole gets it, unless add_prefix_space is false

Source: transformers 4.31 to 4.57, models/llama/tokenization_llama.py (behaviour, not code).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from models.errors import CheckpointError
from models.json_config import JsonConfig
from models.prompts.tokenizer import SENTENCEPIECE_FILE, SPACE, Tokenizer

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto{normalizer_spec{add_dummy_prefix: false}}. Serialised protocol buffers that are
joined are merged, the later value counting, so this behind a model switches its prefix off."""
GUARD = "<unk>"
"""Encoded before a text that begins with a space and cut off again: SentencePiece may drop spaces
at the very beginning."""


@dataclass(frozen=True)
class AddedTokens:
    """Tokens beside the model's own pieces, as a checkpoint's files list them.

    Attributes:
        ids: by name.
        special: those that are left out of decoded text.
        eats_left, eats_right: those that swallow the space before or behind them.
    """

    ids: dict[str, int]
    special: frozenset[str] = frozenset()
    eats_left: frozenset[str] = frozenset()
    eats_right: frozenset[str] = frozenset()


class SentencePieceTokenizer(Tokenizer):
    def __init__(
        self,
        model: bytes,
        *,
        added: Mapping[str, int] | None = None,
        special: Collection[str] = (),
        eats_left: Collection[str] = (),
        eats_right: Collection[str] = (),
        legacy: bool = True,
        add_prefix_space: bool = True,
        add_bos: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            model: the content of `tokenizer.model`.
            added: tokens beside the model's own pieces, and their ids.
            special: those of `added` that are left out of decoded text; the model's control and
                unknown pieces always are.
            eats_left, eats_right: those of `added` that swallow the space before or behind them.
            legacy, add_prefix_space: see above.
            add_bos: texts begin with `bos_token`.
            bos_token: by name, where it is not the model's own.
            eos_token: by name, and
            eos_token_ids: further ends, besides the model's own.
        """
        self._model = SentencePieceProcessor(model_proto=model)
        self._plain = SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self._legacy = legacy
        self._add_prefix_space = add_prefix_space
        self._eats_left, self._eats_right = frozenset(eats_left), frozenset(eats_right)
        self._add_bos = add_bos
        self._guard_length = len(self._plain.encode(GUARD))
        pieces = self._model.get_piece_size()
        control = {
            self._model.id_to_piece(i): i
            for i in range(pieces)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._added = {**control, **(added or {})}
        self._text_of_added = {i: token for token, i in self._added.items()}
        self._skipped = {*control.values(), *(self._added[t] for t in special if t in self._added)}
        self._num_pieces = pieces
        self.added_tokens = frozenset(self._added)
        self.vocab_size = max([pieces - 1, *self._added.values()]) + 1
        named = None if bos_token is None else self.token_to_id(bos_token)
        own = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.bos_token_id = own if named is None else named
        eos = [self._model.eos_id(), None if eos_token is None else self.token_to_id(eos_token)]
        ends = (i for i in (*eos, *eos_token_ids) if i is not None and i >= 0)
        self.eos_token_ids = tuple(dict.fromkeys(ends))
        # Longest first: "<im_start>" must not be found as a shorter token inside it.
        names = sorted(self._added, key=len, reverse=True)
        self._at_added = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @classmethod
    def load(
        cls, folder: Path, config: JsonConfig, eos_token_ids: Sequence[int] = ()
    ) -> SentencePieceTokenizer:
        """
        Args:
            folder: holds `tokenizer.model`, and perhaps `added_tokens.json`.
            config: its tokenizer_config.json, or an empty one.

        Raises:
            CheckpointError: a file cannot be read, or names ids that cannot be.
        """
        added = _added_tokens(folder, config)
        try:
            return cls(
                (folder / SENTENCEPIECE_FILE).read_bytes(),
                added=added.ids,
                special=added.special,
                eats_left=added.eats_left,
                eats_right=added.eats_right,
                legacy=config.get("legacy", bool, True),
                add_prefix_space=config.get("add_prefix_space", bool, True),
                add_bos=config.get("add_bos_token", bool, True),
                bos_token=_named(config, "bos_token"),
                eos_token=_named(config, "eos_token"),
                eos_token_ids=eos_token_ids,
            )
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{SENTENCEPIECE_FILE} is not a readable SentencePiece model"
            ) from error

    def encode(self, text: str) -> list[int]:
        bos = [self.bos_token_id] if self._add_bos and self.bos_token_id is not None else []
        return bos + (self._encode_legacy(text) if self._legacy else self._encode_current(text))

    def _encode_legacy(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._split(text):
            ids += [self._added[piece]] if piece in self._added else self._model.encode(piece)
        return ids

    def _encode_current(self, text: str) -> list[int]:
        if not text:
            return []
        prefix = SPACE if self._add_prefix_space else ""
        pieces = self._split(prefix + text.replace(SPACE, " "))
        if prefix and pieces[0] == SPACE and len(pieces) > 1:
            pieces = pieces[1:]  # a text that begins with an added token has no dummy prefix
        ids: list[int] = []
        for piece in pieces:
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece.startswith((SPACE, " ")):
                ids += self._plain.encode(GUARD + piece)[self._guard_length :]
            else:
                ids += self._plain.encode(piece)
        return ids

    def _split(self, text: str) -> list[str]:
        pieces = self._at_added.split(text)  # texts at even places, added tokens at odd ones
        for at in range(1, len(pieces), 2):
            if pieces[at] in self._eats_left:
                pieces[at - 1] = pieces[at - 1].rstrip()
            if pieces[at] in self._eats_right:
                pieces[at + 1] = pieces[at + 1].lstrip()
        return [piece for piece in pieces if piece]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self._skipped)]
        parts: list[str] = []
        for is_piece, run in groupby(kept, key=self._is_piece):
            if is_piece:
                parts.append(self._model.decode(list(run)))
            else:
                parts += [self._text_of_added.get(i, "") for i in run]
        return "".join(parts)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        if not self._is_piece(token_id):
            return self._text_of_added.get(token_id, "").encode()
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode()

    def _is_piece(self, token_id: int) -> bool:
        return 0 <= token_id < self._num_pieces and token_id not in self._text_of_added

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        piece = int(self._model.piece_to_id(token))
        return None if piece == self._model.unk_id() else piece


def _added_tokens(folder: Path, config: JsonConfig) -> AddedTokens:
    """From either of the two files that may name them."""
    ids: dict[str, int] = {}
    special: set[str] = set()
    eats_left: set[str] = set()
    eats_right: set[str] = set()
    path = folder / "added_tokens.json"
    if path.is_file():
        listed = JsonConfig.read(path, path.name)
        ids |= {token: listed.require(token, int) for token in listed.values}
        for token, token_id in ids.items():
            if not token or token_id < 0:
                raise listed.problem(token, "an added token has a name, and an id from 0 up")
        special |= set(ids)
    for number, entry in config.get("added_tokens_decoder", dict, {}).items():
        token, token_id = _decoder_entry(config, number, entry)
        ids[token] = token_id
        special.discard(token)
        for trait, names in (
            ("special", special), ("lstrip", eats_left), ("rstrip", eats_right),
        ):  # fmt: skip
            if entry.get(trait, False):
                names.add(token)
    return AddedTokens(ids, frozenset(special), frozenset(eats_left), frozenset(eats_right))


def _named(config: JsonConfig, key: str) -> str | None:
    """A special token's text; it stands there as a text, or as an object with all its traits."""
    value = config.values.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise config.problem(key, "it must be a token's text, or an object with its content")
    return text


def _decoder_entry(config: JsonConfig, number: Any, entry: Any) -> tuple[str, int]:
    if not str(number).isdecimal() or not isinstance(entry, dict):
        raise config.problem("added_tokens_decoder", "it must map ids to tokens' descriptions")
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise config.problem("added_tokens_decoder", f"token {number} has no content")
    return content, int(number)
