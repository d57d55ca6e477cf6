"""`<image>` becomes a place among the tokens, as the models were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoints import PromptSpec
from models.errors import CheckpointError, InvalidRequest
from models.prompts import IMAGE_TOKEN_ID, tokenize_prompt
from models.prompts.sentencepiece_ import SentencePieceTokenizer

MODEL = (Path(__file__).parent / "recorded" / "tokenizer.model").read_bytes()
PLAIN = SentencePieceTokenizer(MODEL)
FRAMED = SentencePieceTokenizer(
    MODEL, added={"<im_start>": 400, "<im_end>": 401}, special=["<im_start>", "<im_end>"]
)
SPEC = PromptSpec("vicuna_v1")
WITH_FRAME = PromptSpec("vicuna_v1", use_im_start_end=True)


def tokens(prompt: str, num_images: int) -> list[int]:
    return tokenize_prompt(prompt, PLAIN, num_images=num_images, prompt_spec=SPEC)


def llava(prompt: str) -> list[int]:
    """LLaVA's `tokenizer_image_token`, formulated anew on SentencePiece itself (no added tokens):
    each chunk is encoded with its own dummy prefix, and only the first keeps its BOS."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    out = [1]
    for index, chunk in enumerate(prompt.split("<image>")):
        if index:
            out.append(-200)
        out += processor.encode(chunk) if chunk else []
    return out


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: <image>\nWhat is this? ASSISTANT:",
        "<image>", "<image><image>", "<image> <image>", "<image>\n<image>\nCompare.",
        "a<image>", "<image>a", "no picture", "", "Two  <image>  spaces <image>\n\nthere",
    ],
)  # fmt: skip
def test_chunks_are_tokenised_by_themselves(prompt: str) -> None:
    assert tokens(prompt, prompt.count("<image>")) == llava(prompt)


def test_a_chunk_has_its_own_dummy_prefix() -> None:
    """`... :`, `_`, picture, `_`, `<0x0A>`, `W`: seen by running the original code."""
    text = PLAIN._model.id_to_piece(tokens("USER: <image>\nWhat", 1)[-4:])
    assert text[:2] == ["\u2581", "<0x0A>"]
    assert tokens("USER: <image>\nWhat", 1).count(1) == 1


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["red", " ", "\n", "<image>", ".", "猫"]), max_size=10))
def test_any_mixture_is_as_in_llava(parts: list[str]) -> None:
    prompt = "".join(parts)
    got = tokens(prompt, parts.count("<image>"))
    assert got == llava(prompt)
    assert got.count(IMAGE_TOKEN_ID) == parts.count("<image>")


def test_later_turns_keep_their_ends_of_sequence() -> None:
    prompt = "USER: <image>\na ASSISTANT: b</s>USER: c ASSISTANT:"
    got = tokens(prompt, 1)
    assert got.count(2) == 1 and got.count(1) == 1
    at = got.index(IMAGE_TOKEN_ID)
    assert got[:at] == PLAIN.encode("USER: ")
    assert got[at + 1 :] == PLAIN.encode("\na ASSISTANT: b</s>USER: c ASSISTANT:")[1:]


@pytest.mark.parametrize(
    ("prompt", "given"), [("", 1), ("<image>", 0), ("<image>", 2), ("<image><image>", 1)]
)
def test_another_number_of_pictures_is_the_senders_fault(prompt: str, given: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokens(prompt, given)
    assert caught.value.field == "images"
    assert f"{given} given, but {prompt.count('<image>')} <image>" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["<vila/video>", "<im_start>", "<Image>", "<image", "< image>", "<image/>"]
)
def test_what_only_looks_like_a_placeholder_is_text(text: str) -> None:
    assert tokens(text, 0) == PLAIN.encode(text)
    assert IMAGE_TOKEN_ID not in tokens(text, 0)


def test_pictures_are_framed_where_the_model_was_trained_so() -> None:
    got = tokenize_prompt("a <image> b", FRAMED, num_images=1, prompt_spec=WITH_FRAME)
    a, b = FRAMED.encode("a "), FRAMED.encode(" b")[1:]
    assert got == [*a, 400, IMAGE_TOKEN_ID, 401, *b]
    assert 400 not in tokenize_prompt("a <image> b", FRAMED, num_images=1, prompt_spec=SPEC)


def test_a_frame_that_the_tokenizer_lacks_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="mm_use_im_start_end, but the tokenizer has no <im_"):
        tokenize_prompt("<image>", PLAIN, num_images=1, prompt_spec=WITH_FRAME)


def test_tinychats_rewriting_is_a_backslash_an_n_and_a_space() -> None:
    got = tokenize_prompt(
        "a <image>b<image>", PLAIN, num_images=2, prompt_spec=SPEC, tinychat_prompt_rewrite=True
    )
    assert got == llava("a <image>\\n b<image>\\n ")
    got = tokenize_prompt(
        "<image>b", FRAMED, num_images=1, prompt_spec=WITH_FRAME, tinychat_prompt_rewrite=True
    )
    assert got == [1, 400, IMAGE_TOKEN_ID, 401, *FRAMED.encode("\\n b")[1:]]
    same = tokenize_prompt(
        "no picture", PLAIN, num_images=0, prompt_spec=SPEC, tinychat_prompt_rewrite=True
    )
    assert same == PLAIN.encode("no picture")
