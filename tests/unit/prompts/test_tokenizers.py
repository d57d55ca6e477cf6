"""Token ids are the model's own: those of transformers' slow Llama tokenizer, recorded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.errors import CheckpointError
from models.prompts import Tokenizer, load_tokenizer
from models.prompts.huggingface import HuggingFaceTokenizer
from models.prompts.sentencepiece_ import SentencePieceTokenizer
from tests.synthetic import TOKENIZER_TEXT, rewrite_json, write_tiny_llava

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


def write_fast(folder: Path) -> PreTrainedTokenizerFast:
    """Llama-3's kind: no `tokenizer.model`, byte-level merges, a second end of turn."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|eot|>"]
    fast.train_from_iterator(
        TOKENIZER_TEXT.split("\n"),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    whole = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|begin|>", eos_token="<|end|>"
    )
    whole.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return whole


def test_a_folder_without_a_sentencepiece_model_goes_through_transformers(tmp_path: Path) -> None:
    whole = write_fast(tmp_path)
    loaded: Tokenizer = load_tokenizer(tmp_path)
    assert isinstance(loaded, HuggingFaceTokenizer)
    text = "Hello <|eot|> there\n\n  猫"
    assert loaded.encode(text) == whole.encode(text)
    assert loaded.decode(loaded.encode(text)) == "Hello <|eot|> there\n\n  猫".replace(
        "<|eot|>", ""
    )
    assert loaded.eos_token_ids == (1, 2) and loaded.bos_token_id == 0
    assert loaded.token_to_id("<|eot|>") == 2 and loaded.token_to_id("nothing") is None
    assert loaded.decode([10**6, -200, *loaded.encode("a")]) == "a"


def test_code_in_a_tokenizers_folder_never_runs(tmp_path: Path) -> None:
    write_fast(tmp_path)
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
