"""Llama's kind: a SentencePiece model, with `tokenizer.json` beside it in transformers' layout."""

from __future__ import annotations

import io
import struct
from functools import cache
from itertools import islice
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from models.checkpoints.synthesis.tokenizers.base import (
    TokenizerKind,
    WrittenTokenizer,
    added_token,
    write_json,
)
from models.checkpoints.synthesis.tokenizers.text import filler_words, lines

TRAINED_PIECES = 400
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
FRAME = ("<im_patch>", "<im_start>", "<im_end>")
PADDED_TO = 64
"""transformers' conversions round the embedding's rows up to a multiple of this."""
LAST_SCORE = -1e6
"""Below that of every trained piece."""

YI_BOS, YI_EOS = "<|startoftext|>", "<|endoftext|>"
YI_TOKENS = ("<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>")


class LlamaKind(TokenizerKind):
    """`tokenizer.model` and its two JSON files, as LLaVA's and VILA's checkpoints have them."""

    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(vocabulary))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
        write_json(folder / "tokenizer_config.json", {
            **special, "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "legacy": True,
            "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "model_max_length": context_length, "sp_model_kwargs": {},
        })  # fmt: skip
        frame = FRAME if framed else ()
        if framed:
            added = {token: vocabulary + index for index, token in enumerate(frame)}
            write_json(folder / "added_tokens.json", added)
        return WrittenTokenizer(vocabulary + len(frame), bos=1, eos=2, pad=0, generation_eos=(2,))


class YiKind(TokenizerKind):
    """Yi's: its tokens for chats are pieces of the model, and texts have no beginning."""

    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        model = sentencepiece_model(vocabulary, YI_BOS, YI_EOS, YI_TOKENS)
        (folder / "tokenizer.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = {token: int(processor.piece_to_id(token)) for token in YI_TOKENS}
        special = {"bos_token": YI_BOS, "eos_token": "<|im_end|>", "unk_token": "<unk>"}
        write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
        decoder = {
            "0": added_token("<unk>"), "1": added_token(YI_BOS), "2": added_token(YI_EOS),
            **{str(ids[token]): added_token(token) for token in ("<|im_start|>", "<|im_end|>")},
        }  # fmt: skip
        write_json(folder / "tokenizer_config.json", {
            **special, "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "legacy": True,
            "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": decoder, "model_max_length": context_length,
            "sp_model_kwargs": {},
        })  # fmt: skip
        end = ids["<|im_end|>"]
        return WrittenTokenizer(vocabulary, bos=1, eos=end, pad=0, generation_eos=(end,))


class LlamaHfKind(TokenizerKind):
    """llava-hf's: the same pieces as a fast tokenizer, with `<image>` and `<pad>` added."""

    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        model = sentencepiece_model(vocabulary)
        (folder / "tokenizer.model").write_bytes(model)
        image, pad = vocabulary, vocabulary + 1
        added = {"<image>": image, "<pad>": pad}
        fast_tokenizer(model, added).save(str(folder / "tokenizer.json"))
        special = {
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        }  # fmt: skip
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "added_tokens.json", added)
        names = ("<unk>", "<s>", "</s>")
        decoder = {str(index): added_token(name) for index, name in enumerate(names)}
        decoder |= {str(image): added_token("<image>"), str(pad): added_token("<pad>")}
        write_json(folder / "tokenizer_config.json", {
            **special, "add_bos_token": True, "add_eos_token": False, "legacy": True,
            "added_tokens_decoder": decoder, "clean_up_tokenization_spaces": False,
            "model_max_length": context_length, "padding_side": "left",
            "processor_class": "LlavaProcessor", "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
        })  # fmt: skip
        rows = -(-(vocabulary + len(added)) // PADDED_TO) * PADDED_TO
        return WrittenTokenizer(rows, bos=1, eos=2, pad=pad, image=image, generation_eos=(2,))


def sentencepiece_model(
    vocabulary: int, bos: str = "<s>", eos: str = "</s>", symbols: tuple[str, ...] = ()
) -> bytes:
    """A model in Llama's settings (BPE, byte fallback, single digits), filled up to `vocabulary`.

    Args:
        symbols: pieces that a text is cut at, with the ids from 3 up.
    """
    trained = _trained(bos, eos, symbols)
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained)
    known = {processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    fillers = (f"{SPACE}{word}" for word in filler_words() if f"{SPACE}{word}" not in known)
    missing = vocabulary - processor.get_piece_size()
    if missing < 0:
        raise ValueError(f"a vocabulary of {vocabulary} is below {len(known)}")
    return trained + b"".join(
        _piece(piece, LAST_SCORE - index) for index, piece in enumerate(islice(fillers, missing))
    )


def fast_tokenizer(model: bytes, added: dict[str, int]) -> Tokenizer:
    """The same pieces in the form that transformers converts Llama's tokenizers to."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = range(processor.get_piece_size())
    vocabulary = {processor.id_to_piece(i): i for i in pieces}
    trained = [
        piece for piece, i in vocabulary.items()
        if len(piece) > 1 and not processor.is_byte(i) and not processor.is_control(i)
        and not processor.is_unknown(i) and processor.get_score(i) > LAST_SCORE
    ]  # fmt: skip
    trained.sort(key=lambda piece: -processor.get_score(vocabulary[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in trained
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    names = ["<unk>", "<s>", "</s>", *added]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@cache
def _trained(bos: str, eos: str, symbols: tuple[str, ...]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=model, model_type="bpe",
        vocab_size=TRAINED_PIECES, byte_fallback=True, split_digits=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, bos_piece=bos, eos_piece=eos, user_defined_symbols=list(symbols),
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _piece(text: str, score: float) -> bytes:
    """ModelProto{pieces{piece, score}}. Serialised protocol buffers that are joined are merged:
    behind a model, this is one piece more."""
    encoded = text.encode()
    body = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(body)]) + body
