"""`<image>` becomes a place among the tokens, as the models were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from models.checkpoints import PromptSpec
from models.errors import CheckpointError, InvalidRequest
from models.prompts import IMAGE_TOKEN_ID, load_tokenizer, tokenize_prompt
from models.prompts.sentencepiece_ import SentencePieceTokenizer
from tests.unit.prompts.tiny_tokenizers import write_llava_hf, write_qwen2

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


# ---- the whole at once ----------------------------------------------------------------------

WHOLE = PromptSpec("vicuna_v1", tokenization="whole")
NVILA = PromptSpec("nvila", tokenization="whole", image_suffix="\n")
PROMPTS = (
    "USER: <image>\nWhat is this? ASSISTANT:", "<image>", "<image>\n<image>\nCompare.",
    "a<image>b <image>  c<image>", "<image><image>", "no picture</s>USER: two ASSISTANT:",
    "[INST] <image>\nWhat? [/INST] That. </s>[INST] Why? [/INST]",
)  # fmt: skip


def whole(prompt: str, folder: Path, spec: PromptSpec = WHOLE, **options: bool) -> list[int]:
    return tokenize_prompt(
        prompt, load_tokenizer(folder, "whole"), num_images=prompt.count("<image>"),
        prompt_spec=spec, **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["", "legacy"])
def llava_hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava-hf")
    write_llava_hf(folder, legacy=request.param)
    return folder


@pytest.mark.parametrize("kind", ["llava", "llava-next"])
def test_ids_are_those_of_transformers_processors(kind: str, llava_hf: Path) -> None:
    """Each `<image>` stands for as many of the processor's image tokens as its picture has."""
    tokenizer = AutoTokenizer.from_pretrained(llava_hf)
    options = {
        "tokenizer": tokenizer, "patch_size": 14, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    size = {"shortest_edge": 28}
    processor: LlavaProcessor | LlavaNextProcessor
    if kind == "llava":
        images = CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(images, **options)
    else:
        anyres = LlavaNextImageProcessorPil(
            size=size, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56]]
        )
        processor = LlavaNextProcessor(anyres, **options)
    picture = Image.new("RGB", (40, 30))
    own = tokenizer.convert_tokens_to_ids("<image>")
    per_picture = processor(text="<image>", images=[picture])["input_ids"][0].count(own)
    assert per_picture >= 4
    for prompt in PROMPTS:
        count = prompt.count("<image>")
        expected = processor(text=prompt, images=[picture] * count if count else None)
        got = [
            i for token in whole(prompt, llava_hf)
            for i in ([own] * per_picture if token == IMAGE_TOKEN_ID else [token])
        ]  # fmt: skip
        assert got == expected["input_ids"][0], prompt


def nvila(prompt: str, folder: Path) -> list[int]:
    """VILA's way (b760c34): media tokens are added to the tokenizer, the prompt is tokenised in
    one call, and a picture is followed by the tokens of a newline by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in ("<vila/sentinel>", "<image>", "<vila/video>"):
        tokenizer.add_tokens([token], special_tokens=True)
    out: list[int] = []
    for token in tokenizer(prompt).input_ids:
        is_picture = token == tokenizer.convert_tokens_to_ids("<image>")
        out += [-200, *tokenizer("\n").input_ids] if is_picture else [token]
    return out


@pytest.mark.parametrize("media", [(), ("<vila/sentinel>", "<image>", "<vila/video>")])
@pytest.mark.parametrize("vocabulary_files", [True, False])
def test_nvilas_pictures_are_followed_by_the_encoders_newline(
    media: tuple[str, ...], vocabulary_files: bool, tmp_path: Path
) -> None:
    """Whether the tokenizer's files have the placeholder already or not."""
    write_qwen2(tmp_path, vocabulary_files=vocabulary_files, media=media)
    for prompt in (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n<image>What "
        "is  this?<|im_end|>\n<|im_start|>assistant\n",
        "<image>\n<image>\n", "a <image> b", "none",
    ):  # fmt: skip
        assert whole(prompt, tmp_path, NVILA) == nvila(prompt, tmp_path)


def test_a_llama_tokenizers_newline_has_a_beginning_and_a_prefix(llava_hf: Path) -> None:
    got = whole("x <image>y", llava_hf, NVILA)
    assert got == nvila("x <image>y", llava_hf)
    at = got.index(IMAGE_TOKEN_ID)
    assert got[at + 1 : at + 4] == [1, PLAIN.token_to_id("\u2581"), 13], "BOS, prefix, newline"


def test_a_suffix_follows_pictures_of_prompts_in_pieces_too() -> None:
    spec = PromptSpec("vicuna_v1", image_suffix="\n")
    got = tokenize_prompt("a<image>b", PLAIN, num_images=1, prompt_spec=spec)
    a, b = PLAIN.encode("a"), PLAIN.encode("b")[1:]
    assert got == [*a, IMAGE_TOKEN_ID, *PLAIN.encode("\n"), *b]


def test_frame_and_rewriting_in_the_whole(tmp_path: Path) -> None:
    write_qwen2(tmp_path, media=("<im_start>", "<im_end>"))
    tokenizer = load_tokenizer(tmp_path, "whole")
    spec = PromptSpec("qwen", use_im_start_end=True, tokenization="whole")
    start, end = tokenizer.token_to_id("<im_start>"), tokenizer.token_to_id("<im_end>")
    assert whole("a <image>b", tmp_path, spec) == [
        *tokenizer.encode("a "), start, IMAGE_TOKEN_ID, end, *tokenizer.encode("b")
    ]  # fmt: skip
    rewritten = whole("a <image>b", tmp_path, WHOLE, tinychat_prompt_rewrite=True)
    assert rewritten == [*tokenizer.encode("a "), IMAGE_TOKEN_ID, *tokenizer.encode("\\n b")]


@pytest.mark.parametrize("given", [0, 2])
def test_another_number_of_pictures_is_refused_in_the_whole_too(given: int, tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    with pytest.raises(InvalidRequest, match=f"^images: {given} given, but 1 <image>"):
        tokenize_prompt(
            "a <image>", load_tokenizer(tmp_path, "whole"), num_images=given, prompt_spec=WHOLE
        )


def test_a_tokenizer_without_the_placeholder_is_given_pieces() -> None:
    got = tokenize_prompt("a <image> b", PLAIN, num_images=1, prompt_spec=WHOLE)
    assert got == tokens("a <image> b", 1)
