"""Token ids are the model's own: those of transformers' slow Llama tokenizer, recorded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from models.errors import CheckpointError
from models.prompts import Tokenizer, load_tokenizer
from models.prompts.huggingface import HuggingFaceTokenizer
from models.prompts.sentencepiece_ import SentencePieceTokenizer
from tests.checkpoint_files import rewrite_json
from tests.tiny import TOKENIZER_TEXT, write_tiny_llava
from tests.unit.prompts.tiny_tokenizers import write_gpt2, write_llama_3, write_qwen2

RECORDED = Path(__file__).parent / "recorded"
ENTRIES: list[dict[str, Any]] = json.loads((RECORDED / "slow_llama_tokenizer.json").read_text())


@cache
def model() -> bytes:
    return (RECORDED / "tokenizer.model").read_bytes()


@cache
def tokenizer(legacy: bool = True, *added: str) -> SentencePieceTokenizer:
    ids = {token: 400 + index for index, token in enumerate(added)}
    return SentencePieceTokenizer(model(), added=ids, special=added, legacy=legacy)


# ---- sentencepiece --------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("with_added", [False, True], ids=["", "with added tokens"])
def test_ids_are_those_of_the_slow_tokenizer(legacy: bool, with_added: bool) -> None:
    """Multi-turn text with </s>, newlines, double spaces; see recorded/texts.json."""
    entries = [e for e in ENTRIES if e["legacy"] == legacy and bool(e["added"]) == with_added]
    assert len(entries) > 50
    for entry in entries:
        got = tokenizer(legacy, *entry["added"]).encode(entry["text"])
        assert got == entry["ids"], entry["text"]


def test_the_recorded_texts_tell_the_two_behaviours_apart() -> None:
    """Otherwise the recording could not tell whether `legacy` is honoured."""
    by_text: dict[str, set[tuple[int, ...]]] = {}
    for entry in ENTRIES:
        by_text.setdefault(f"{entry['added']}{entry['text']}", set()).add(tuple(entry["ids"]))
    assert sum(len(ids) == 2 for ids in by_text.values()) > 15


PIECES = st.sampled_from(
    ["red", " ", "  ", "\n", "</s>", "<s>", "<unk>", "USER:", " a", "猫", "\N{GRINNING FACE}",
     "12", ".", "</s", "\u2581"]
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(PIECES, max_size=12))
def test_legacy_is_sentencepiece_between_added_tokens(pieces: list[str]) -> None:
    """The slow tokenizer formulated anew: cut at added tokens, the rest as SentencePiece has it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model())
    text, expected = "".join(pieces), [1]
    added = {"</s>": 2, "<s>": 1, "<unk>": 0}
    rest = text
    while rest:
        at, token = min(
            ((rest.find(token), token) for token in added if token in rest), default=(-1, "")
        )
        if at < 0:
            expected += processor.encode(rest)
            break
        if at > 0:
            expected += processor.encode(rest[:at])
        expected.append(added[token])
        rest = rest[at + len(token) :]
    assert tokenizer().encode(text) == expected


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=80)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_decoding_gives_the_text_back(legacy: bool, text: str) -> None:
    assume("<unk>" not in text and "<s>" not in text and "</s>" not in text)  # tokens, not text
    got = tokenizer(legacy).decode(tokenizer(legacy).encode(text))
    assert got == text.replace("\u2581", " ")


def test_special_tokens_are_left_out_of_text_unless_asked_for() -> None:
    ids = tokenizer().encode("red</s>blue")
    assert tokenizer().decode(ids) == "red blue"
    assert tokenizer().decode(ids, skip_special_tokens=False) == "<s>red</s>blue"
    framed = tokenizer(True, "<im_start>")
    assert framed.decode(framed.encode("a<im_start>")) == "a"
    assert framed.decode([400], skip_special_tokens=False) == "<im_start>"


def test_ids_in_no_vocabulary_are_passed_over() -> None:
    red = tokenizer().encode("red")
    assert tokenizer().decode([*red, 10**6, -200, 400]) == "red"


def test_the_longest_added_token_is_found_first() -> None:
    nested = SentencePieceTokenizer(model(), added={"<im>": 400, "<im>x": 401})
    assert nested.encode("<im>x<im>")[1:] == [401, 400]


def test_ids_by_name() -> None:
    framed = tokenizer(True, "<im_start>")
    assert [framed.token_to_id(t) for t in ("<s>", "</s>", "<unk>", "<im_start>")] == [1, 2, 0, 400]
    assert framed.token_to_id("<0x0A>") == 13
    assert framed.token_to_id("no such token") is None
    assert (framed.vocab_size, framed.bos_token_id, framed.eos_token_ids) == (401, 1, (2,))


def test_one_tokenizer_serves_several_threads() -> None:
    texts = [entry["text"] for entry in ENTRIES if entry["legacy"]] * 4
    expected = [tokenizer().encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer().encode, texts)) == expected


# ---- from folders ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llava(tmp_path / "tiny", awq=False)


def test_a_folder_with_a_sentencepiece_model_is_read_by_sentencepiece(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.encode("Hi</s>there") == tokenizer(True).encode("Hi</s>there")
    rewrite_json(folder / "tokenizer_config.json", legacy=False)
    assert load_tokenizer(folder).encode("Hi</s>there") == tokenizer(False).encode("Hi</s>there")
    rewrite_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(folder).encode("Hi")[0] != 1


def test_a_bare_model_is_llamas_legacy_way(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    assert load_tokenizer(folder).encode(" a</s>b") == tokenizer(True).encode(" a</s>b")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_come_from_either_file(where: str, folder: Path) -> None:
    if where == "added_tokens.json":
        (folder / where).write_text(json.dumps({"<im_start>": 400, "<im_end>": 401}))
    else:
        rewrite_json(folder / where, added_tokens_decoder={
            "400": {"content": "<im_start>", "special": True},
            "401": {"content": "<im_end>", "special": False},
            "2": {"content": "</s>", "special": True},
        })  # fmt: skip
    loaded = load_tokenizer(folder)
    assert (loaded.token_to_id("<im_start>"), loaded.vocab_size) == (400, 402)
    assert loaded.encode("<im_start><im_end>") == [1, 400, 401]
    shown = "" if where == "added_tokens.json" else "<im_end>"
    assert loaded.decode([400, 401]) == shown, "special tokens only are left out"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<im>": "400"}, "added_tokens.json: <im> is '400'; it must be"),
        ("added_tokens.json", {"<im>": -1}, "an added token has a name, and an id from 0 up"),
        ("added_tokens.json", {"": 400}, "an added token has a name, and an id from 0 up"),
        ("added_tokens.json", [], "added_tokens.json must hold a JSON object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<im>"}}},
            "map ids to",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": "<im>"}}, "map ids to"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"400": {}}},
            "token 400 has no content",
        ),
        ("tokenizer_config.json", {"legacy": "yes"}, "tokenizer_config.json: legacy is 'yes'"),
        (
            "generation_config.json",
            {"eos_token_id": "2"},
            "generation_config.json: eos_token_id is",
        ),
        ("generation_config.json", {"eos_token_id": [2, None]}, "must be a token id, or a list"),
    ],
)
def test_wrong_files_beside_the_model_are_named(
    file: str, content: object, message: str, folder: Path
) -> None:
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert message in str(caught.value)


def test_a_damaged_sentencepiece_model_is_named(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a readable SentencePiece"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), (7, (2, 7)), ([2, 7, 9], (2, 7, 9)), (None, (2,))]
)
def test_ends_of_sequence_come_from_the_generation_config_too(
    value: object, expected: tuple[int, ...], folder: Path
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load_tokenizer(folder).eos_token_ids == expected


KINDS: dict[str, Callable[[Path], FastTokenizer]] = {
    "Llama-3": write_llama_3,
    "Qwen2, vocabulary and merges": write_qwen2,
    "Qwen2, tokenizer.json": partial(write_qwen2, vocabulary_files=False),
    "GPT-2": write_gpt2,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
MULTI_TURN = (
    "<|im_start|>user\n<image>\nWhat  is it?<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|endoftext|> red", "A chat between a curious user. USER: 12345 objects ASSISTANT:",
    "e\u0301 e\u0301<|im_end|>", "it's THEY'RE \r\n\n\t x", " lead", "trail  ", "",
    "Gr\u00fc\u00dfe, \u732b\U0001f600!",
)  # fmt: skip


@every_kind
@pytest.mark.parametrize("tokenization", ["pieces", "whole"])
def test_ids_are_those_of_the_library_that_the_tokenizer_was_made_with(
    kind: str, tokenization: Any, tmp_path: Path
) -> None:
    made = KINDS[kind](tmp_path)
    loaded: Tokenizer = load_tokenizer(tmp_path, tokenization)
    assert isinstance(loaded, HuggingFaceTokenizer)
    if tokenization == "whole":
        made.add_special_tokens([AddedToken("<image>", normalized=False)])
        assert loaded.token_to_id("<image>") == made.token_to_id("<image>")
    for text in MULTI_TURN:
        ids = made.encode(text).ids
        assert loaded.encode(text) == ids, text
        seen = made.decode(ids, skip_special_tokens=True)
        if tokenization == "pieces":
            assert loaded.decode(ids) == seen
            assert loaded.decode(ids, False) == made.decode(ids, skip_special_tokens=False)


@every_kind
def test_added_tokens_are_one_id_each_and_no_text(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind](tmp_path)
    loaded = load_tokenizer(tmp_path)
    special = {token.content for token in made.get_added_tokens_decoder().values()}
    assert loaded.added_tokens == special
    assert loaded.vocab_size == made.get_vocab_size()
    begin = len(loaded.encode(""))
    for name in special:
        token = loaded.token_to_id(name)
        assert token is not None and loaded.encode(f"a{name}b")[begin:].count(token) == 1
        assert loaded.decode([token]) == ""
    assert loaded.token_to_id("nothing") is None
    assert loaded.decode([10**6, -200, *loaded.encode("a")]) == "a"


def test_ends_of_sequence_of_every_kind(tmp_path: Path) -> None:
    made = write_llama_3(tmp_path / "llama-3")
    loaded = load_tokenizer(tmp_path / "llama-3")
    ends = {made.token_to_id("<|eot_id|>"), made.token_to_id("<|end_of_text|>")}
    assert set(loaded.eos_token_ids) == ends
    assert loaded.bos_token_id == made.token_to_id("<|begin_of_text|>")
    made = write_qwen2(tmp_path / "qwen")
    loaded = load_tokenizer(tmp_path / "qwen")
    assert loaded.eos_token_ids == (made.token_to_id("<|im_end|>"),)
    assert loaded.bos_token_id is None


def test_the_placeholder_is_no_part_of_the_vocabulary_that_requests_may_name(
    tmp_path: Path,
) -> None:
    write_qwen2(tmp_path)
    pieces, whole = load_tokenizer(tmp_path), load_tokenizer(tmp_path, "whole")
    assert pieces.token_to_id("<image>") is None
    assert pieces.vocab_size == whole.vocab_size == whole.token_to_id("<image>")


# ---- Yi, the language model of LLaVA-1.6-34B ------------------------------------------------


@cache
def yi_model() -> bytes:
    """SentencePiece without a dummy prefix, ChatML's marks among its pieces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.strip().split("\n")), model_writer=file,
        model_type="bpe", vocab_size=400, byte_fallback=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<|im_start|>", "<|im_end|>"], unk_id=0, bos_id=1, eos_id=2,
        bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", pad_id=-1, num_threads=1,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
def test_yis_tokenizer_has_no_dummy_prefix_and_ends_at_chatmls_mark(
    legacy: bool, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(yi_model())
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": False,
        "add_bos_token": False, "bos_token": "<|startoftext|>",
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {
            "3": {"content": "<|im_start|>", "special": True},
            "4": {"content": "<|im_end|>", "special": True},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=yi_model())
    text = "<|im_start|>user\nWhat is  it?<|im_end|><|im_start|>assistant\n"
    expected = [
        3, *processor.encode("user\nWhat is  it?"), 4, 3, *processor.encode("assistant\n")
    ]  # fmt: skip
    assert loaded.encode(text) == expected
    assert loaded.decode(expected) == "user\nWhat is  it?assistant\n"
    assert (loaded.bos_token_id, set(loaded.eos_token_ids)) == (1, {2, 4})


# ---- loading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traits", "text", "same_as"),
    [
        ({}, "red <im> blue", "red <im> blue"),
        ({"lstrip": True}, "red  <im> blue", "red<im> blue"),
        ({"rstrip": True}, "red <im>  blue", "red <im>blue"),
        ({"lstrip": True, "rstrip": True}, " <im> <im> ", "<im><im>"),
    ],
)
def test_an_added_token_may_swallow_space(
    traits: dict[str, bool], text: str, same_as: str, folder: Path
) -> None:
    """The slow tokenizer strips the neighbours of such a token before it encodes them."""
    rewrite_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={"400": {"content": "<im>", "special": True, **traits}},
    )
    plain = SentencePieceTokenizer(model(), added={"<im>": 400})
    assert load_tokenizer(folder).encode(text) == plain.encode(same_as)


def test_named_special_tokens_must_be_text(folder: Path) -> None:
    rewrite_json(folder / "tokenizer_config.json", eos_token=7)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: eos_token is 7; it must"):
        load_tokenizer(folder)


def test_code_in_a_tokenizers_folder_never_runs(tmp_path: Path) -> None:
    write_llama_3(tmp_path)
    marker = tmp_path / "owned"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    rewrite_json(
        tmp_path / "tokenizer_config.json", tokenizer_class="T",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
    )  # fmt: skip
    with suppress(CheckpointError):  # whether it can be read without its code is transformers' say
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_a_folder_without_any_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*tokenizer\.model, tokenizer"):
        load_tokenizer(tmp_path)
