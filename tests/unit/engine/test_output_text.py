"""Text comes in pieces that never have to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.engine.output_text import REPLACEMENT, OutputText
from models.prompts import Tokenizer, load_tokenizer
from models.prompts.huggingface import HuggingFaceTokenizer
from models.prompts.sentencepiece_ import SentencePieceTokenizer
from tests.tiny import TOKENIZER_TEXT, tokenizer_model
from tests.unit.prompts.tiny_tokenizers import (
    write_gpt2,
    write_llama_3,
    write_llava_hf,
    write_qwen2,
)


class ByteTokenizer:
    """One token per UTF-8 byte, as with byte fallback."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces with a leading space each, which the first loses: SentencePiece's way."""

    words = ("\u2581the", "\u2581cat", "s", "\u2581", "\n")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = "".join(self.words[i] for i in ids).replace("\u2581", " ")
        return text.removeprefix(" ")


def feed(text: str, stop: Sequence[str] = ()) -> tuple[list[str], OutputText]:
    output = OutputText(ByteTokenizer(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(output.append(byte))
        if output.stopped:
            return pieces, output
    return [*pieces, output.finish()], output


def test_a_character_comes_whole_or_not_at_all() -> None:
    pieces, _ = feed("a猫b")
    assert pieces == ["a", "", "", "猫", "b", ""]


def test_an_unfinished_character_comes_at_the_end_as_a_replacement() -> None:
    output = OutputText(ByteTokenizer())
    assert [output.append(b) for b in "猫".encode()[:2]] == ["", ""]
    assert output.finish() == "\ufffd"


def test_broken_bytes_do_not_hold_the_stream_back_for_ever() -> None:
    output = OutputText(ByteTokenizer())
    text = "".join(output.append(0xFF) for _ in range(20)) + output.append(ord("x"))
    assert text.count("\ufffd") == 20 and text.endswith("x")


def test_spaces_between_pieces_survive() -> None:
    output = OutputText(WordTokenizer())
    assert [output.append(i) for i in (0, 1, 2, 4, 0)] == ["the", " cat", "s", "\n", " the"]


def test_the_text_ends_before_a_stop_string() -> None:
    pieces, output = feed("red###Human: and", ["###", "</s>"])
    assert "".join(pieces) == "red" and output.stopped
    assert output.finish() == ""


def test_what_only_began_like_a_stop_string_is_delivered() -> None:
    pieces, output = feed("a ## b #", ["###"])
    assert "".join(pieces) == "a ## b #" and not output.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    output = OutputText(WordTokenizer(), ["cats", " c"])
    assert output.append(0) == "the"
    assert output.append(1) == "" and output.stopped


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    stop = [s for s in (s.encode("utf-8", errors="ignore").decode() for s in stop) if s]
    pieces, output = feed(text, stop)
    got = "".join(pieces)
    ends = []
    for end in range(len(text) + 1):
        ends = [text[:end].index(s) for s in stop if s in text[:end]]
        if ends:
            break
    assert got == (text[: min(ends)] if ends else text)
    assert output.stopped == bool(ends)


# ---- real tokenizers ------------------------------------------------------------------------


class ChunkTokenizer:
    """Any cut of a text's bytes into tokens, as merges of a byte-level BPE may cut them."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.chunks = chunks

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.chunks[i] for i in ids).decode("utf-8", errors="replace")


@cache
def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer(tokenizer_model())


@cache
def byte_level() -> Tokenizer:
    """Llama-3's and Qwen2's kind."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TOKENIZER_TEXT.split("\n"),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    )


@cache
def byte_fallback() -> Tokenizer:
    """Llama-2's kind in transformers' own format."""
    from tokenizers import normalizers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TOKENIZER_TEXT.split("\n"),
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*special, *bytes_], show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    return HuggingFaceTokenizer(fast)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": sentencepiece, "byte level": byte_level, "byte fallback": byte_fallback,
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def stream(tokenizer: Tokenizer | ChunkTokenizer, ids: Sequence[int]) -> str:
    """The pieces joined; each piece is checked to be final, since it is a client's already."""
    output = OutputText(tokenizer)
    return "".join([*(output.append(i) for i in ids), output.finish()])


@settings(max_examples=150)
@given(texts, st.data())
def test_any_cut_of_a_text_into_tokens_streams_to_that_text(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw))))))
    edges = [0, *(cut for cut in cuts if cut < len(raw)), len(raw)]
    tokenizer = ChunkTokenizer([raw[a:b] for a, b in pairwise(edges)])
    output = OutputText(tokenizer)
    pieces = [output.append(i) for i in range(len(tokenizer.chunks))]
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert "".join(pieces) == text, "whole characters are not held back"
    assert "".join([*pieces, output.finish()]) == text


def test_characters_cut_across_every_token_come_one_token_late() -> None:
    """Each token ends one character and begins the next, for longer than any character is."""
    raw = "猫犬鳥魚虫馬".encode()
    chunks = [raw[:1], *(raw[i : i + 3] for i in range(1, len(raw), 3))]
    output = OutputText(ChunkTokenizer(chunks))
    assert [output.append(i) for i in range(len(chunks))] == ["", *"猫犬鳥魚虫馬"]


def test_broken_bytes_do_not_swallow_the_character_behind_them() -> None:
    raw = b"\xff\xf0\x9f\x98\x80!"
    assert stream(ByteTokenizer(), raw) == f"{REPLACEMENT}\N{GRINNING FACE}!"  # type: ignore[arg-type]


@every_kind
@settings(max_examples=60)
@given(text=texts)
def test_a_text_streams_to_itself(kind: str, text: str) -> None:
    """Every character outside of the small vocabulary goes by its bytes."""
    tokenizer = KINDS[kind]()
    ids = [i for i in tokenizer.encode(text) if i != tokenizer.bos_token_id]
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    if "\u2581" not in text and kind != "byte fallback":
        assert tokenizer.decode(ids) == text


@settings(max_examples=150)
@example([197, 0, 0, 0, 131])  # the two bytes of a character, with unknown tokens between them
@given(st.lists(st.integers(0, 399), max_size=25))
def test_any_sentencepiece_tokens_stream_to_their_text(ids: list[int]) -> None:
    """Broken bytes, unknown and control tokens, spaces: whatever a model may say."""
    assert stream(sentencepiece(), ids) == sentencepiece().decode(ids)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 399), max_size=25))
def test_any_byte_level_tokens_stream_to_their_text(ids: list[int]) -> None:
    assert stream(byte_level(), ids) == byte_level().decode(ids)


@every_kind
@settings(max_examples=60)
@given(garbage=st.lists(st.integers(3, 258), max_size=12), text=st.sampled_from(["red cat", "a b"]))
def test_words_behind_broken_bytes_are_not_lost(kind: str, garbage: list[int], text: str) -> None:
    tokenizer = KINDS[kind]()
    words = [i for i in tokenizer.encode(text) if i != tokenizer.bos_token_id]
    assert stream(tokenizer, [*garbage, *words]).endswith(text)


@every_kind
def test_a_space_behind_a_token_without_text_survives(kind: str) -> None:
    tokenizer = KINDS[kind]()
    red, blue = (
        [i for i in tokenizer.encode(word) if i != tokenizer.bos_token_id]
        for word in ("red", " blue" if kind == "byte level" else "blue")
    )
    (end,) = tokenizer.eos_token_ids
    assert (
        stream(tokenizer, [*red, end, *blue]) == "red blue" == tokenizer.decode([*red, end, *blue])
    )


# ---- as checkpoints have them ---------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], object]] = {
    "Llama-3": write_llama_3, "Qwen2": write_qwen2, "GPT-2": write_gpt2, "llava-hf": write_llava_hf,
}  # fmt: skip
every_checkpoint = pytest.mark.parametrize("kind", WRITERS)


@cache
def loaded(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        WRITERS[kind](Path(folder))
        return load_tokenizer(Path(folder), "whole" if kind == "llava-hf" else "pieces")


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[len(tokenizer.encode("")) :]


@every_checkpoint
@settings(max_examples=80)
@given(data=st.data())
def test_texts_between_special_tokens_stream_to_themselves(kind: str, data: st.DataObject) -> None:
    """And ids that no vocabulary has are passed over."""
    tokenizer = loaded(kind)
    special = [tokenizer.token_to_id(name) for name in sorted(tokenizer.added_tokens)]
    unknown = [tokenizer.vocab_size + 2, 10**6]
    runs = st.one_of(
        st.sampled_from([[i] for i in (*special, *unknown) if i is not None]),
        texts.map(lambda text: plain_ids(tokenizer, text)),
    )
    ids = [i for run in data.draw(st.lists(runs, max_size=6)) for i in run]
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["Llama-3", "Qwen2", "GPT-2"])
def test_a_byte_level_answer_keeps_its_spaces(kind: str) -> None:
    """Here a space belongs to its token; nothing at an answer's beginning was put there by the
    tokenizer."""
    tokenizer = loaded(kind)
    for text in (" The image", "The  image ", "\n\n- a\n  b", "  "):
        ids = plain_ids(tokenizer, text)
        output = OutputText(tokenizer)
        pieces = [output.append(i) for i in ids]
        assert pieces == [tokenizer.decode([i]) for i in ids], "nothing is held back"
        assert "".join(pieces) == text


@every_checkpoint
def test_a_character_of_several_tokens_comes_with_its_last(kind: str) -> None:
    tokenizer = loaded(kind)
    ids = plain_ids(tokenizer, "a\N{GRINNING FACE}\u732bz")
    output = OutputText(tokenizer)
    pieces = [output.append(i) for i in ids]
    shown = [piece for piece in pieces if piece]
    assert len(ids) >= 9 and REPLACEMENT not in "".join(pieces)
    assert shown == ["a", "\N{GRINNING FACE}", "\u732b", "z"]


@every_checkpoint
def test_special_tokens_say_nothing_and_take_nothing_away(kind: str) -> None:
    tokenizer = loaded(kind)
    special = [tokenizer.token_to_id(name) for name in sorted(tokenizer.added_tokens)]
    red, ids = plain_ids(tokenizer, "red"), plain_ids(tokenizer, "red blue")
    cut = len(red)
    assert ids[:cut] == red and special
    for token in special:
        assert token is not None
        assert stream(tokenizer, [token, *ids[:cut], token, *ids[cut:], token]) == "red blue"


@pytest.mark.parametrize("stop", ["###", " blue", "\u732b"])
@every_checkpoint
def test_a_stop_string_cut_over_tokens_is_found(kind: str, stop: str) -> None:
    tokenizer = loaded(kind)
    output = OutputText(tokenizer, [stop])
    text = ""
    for token in plain_ids(tokenizer, f"red, green{stop} and more"):
        text += output.append(token)
        if output.stopped:
            break
    assert output.stopped and text == "red, green"
