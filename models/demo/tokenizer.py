"""Trains the demo model's BPE on its own texts, in Llama's settings.

Byte fallback, "▁" for spaces, single digits; <unk>, <s> and </s> are 0, 1 and 2. Any UTF-8 text
can be encoded: characters that are not in the vocabulary become their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from models.demo import dialogue, questions, sampling
from models.demo.labels import WORDS

VOCABULARY = 640
"""Embeddings and head are in both files of the checkpoint, so every token costs 2 KB."""
UNKNOWN, BEGIN, END = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")
SCENES = 6000
SYSTEM_PROMPTS = 400
"""Of each that is not rare, so that their words become tokens."""


def train_tokenizer(seed: int = 0, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Deterministic."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Split(Regex("\n"), "isolated"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL, *bytes_], show_progress=False,
        min_frequency=2,
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer = _with_plain_bytes(tokenizer, bytes_)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """tokenizer.json and what AutoTokenizer reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<unk>", "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }  # fmt: skip
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """
    Raises:
        ValueError: one of them is not a token by itself.
    """
    ids = []
    for word in words:
        *space, token = tokenizer.encode(word, add_special_tokens=False).ids
        if space and tokenizer.id_to_token(space[0]) != "▁":
            raise ValueError(f"{word!r} is more than one token")
        ids.append(token)
    return ids


def _with_plain_bytes(tokenizer: Tokenizer, bytes_: list[str]) -> Tokenizer:
    """The trainer marks every token that it is given as special; "<0x41>" in a text is not."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in bytes_
    ]
    plain: Tokenizer = Tokenizer.from_str(json.dumps(state))
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return plain


def _texts(seed: int) -> Iterator[str]:
    rng = Random(f"tokenizer:{seed}")
    for prompt in (dialogue.VICUNA_V1, dialogue.LLAVA_V1):
        yield from [prompt] * SYSTEM_PROMPTS
    fixed = (
        *questions.COUNTS, questions.IDENTITY, questions.GREETING, questions.OFF_SUBJECT,
        *(f"It is {place}." for row in questions.PLACES for place in row),
    )  # fmt: skip
    for _ in range(SYSTEM_PROMPTS):
        yield dialogue.random_system(rng)
        yield from fixed
        yield from (word for words in WORDS for word in words * 3)
    for _ in range(SCENES):
        about = questions.questions_about(sampling.random_scene(rng), rng)
        asked = rng.sample(about, min(4, len(about)))
        talk = dialogue.compose(asked, "", "before", rng)
        for text in (talk.prompt, *talk.later):
            yield from text.split(dialogue.IMAGE)
        yield from talk.answers
    for _ in range(SCENES // 6):
        for question in (questions.off_subject(rng), questions.chat(rng)):
            # Letters that Latin script does not have are left to their bytes.
            yield from ("".join(c for c in question.text if c.isascii()), question.answer)
