"""The demo model's tokenizer, as the engine loads it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from models.checkpoints.spec import PromptSpec
from models.demo import DEMO_CHECKPOINT
from models.demo.dialogue import LLAVA_V1, VICUNA_V1, compose
from models.demo.labels import WORDS
from models.demo.packing import PICTURE, Encoder
from models.demo.questions import Question
from models.demo.tokenizer import BEGIN, END, VOCABULARY, train_tokenizer, word_ids
from models.prompts import IMAGE_TOKEN_ID, load_tokenizer, tokenize_prompt

TEXTS = (
    "The image shows a red circle.", "  two  spaces ", "line\nbreak\n", "Grüße, 你好, 🙂!",
    "<0x41> is no byte here", "x" * 50, "1234567890", "\t\x00\x7f",
)  # fmt: skip


@pytest.fixture(scope="module")
def served():
    return load_tokenizer(DEMO_CHECKPOINT)


def test_training_it_is_deterministic_and_gives_words_for_what_is_seen():
    trained = train_tokenizer()
    assert trained.to_str() == train_tokenizer().to_str()
    assert trained.get_vocab_size() == VOCABULARY
    assert all(len(word_ids(trained, words)) == len(words) for words in WORDS)


def test_the_stored_one_has_the_ids_that_the_config_names(served):
    assert served.vocab_size == VOCABULARY
    assert (served.bos_token_id, served.eos_token_ids) == (BEGIN, (END,))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(served, text):
    ids = served.encode(text)
    assert ids[0] == BEGIN
    assert served.decode(ids) == text.removeprefix(" ")


@pytest.mark.parametrize("system", [VICUNA_V1, LLAVA_V1, ""])
@pytest.mark.parametrize("place", ["before", "after", "none"])
def test_training_sees_the_ids_that_are_served(served, rng, system, place):
    encoder = Encoder(Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json")))
    questions = [Question("", "", "What is this?", "It is red."), Question("", "", "Why?", "No.")]
    for _ in range(20):
        dialogue = compose(questions, system, place, rng)
        text = f"{dialogue.prompt} It is red.</s>{dialogue.later[0]} No.</s>"
        expected = tokenize_prompt(
            text, served, num_images=text.count("<image>"), prompt_spec=PromptSpec("vicuna_v1")
        )
        trained = encoder.dialogue(dialogue).ids
        assert [IMAGE_TOKEN_ID if i == PICTURE else i for i in trained] == expected


def test_its_own_system_prompt_is_short(served):
    assert len(served.encode(VICUNA_V1)) <= 33
