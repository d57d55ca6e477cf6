"""GPT-2's kind, on bytes: Llama-3's (`tokenizer.json` alone) and Qwen2's."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

from models.checkpoints.synthesis.tokenizers.base import (
    TokenizerKind,
    WrittenTokenizer,
    added_token,
    write_json,
)
from models.checkpoints.synthesis.tokenizers.text import filler_words, lines

TRAINED_TOKENS = 400
SPACE = "Ġ"
"""GPT-2's letter for the byte of a space."""
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where texts are cut before merging: contractions, words, up to three digits, signs, spaces."""

LLAMA_3_NAMED = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
    9: "<|eot_id|>",
}  # fmt: skip
LLAMA_3_SPECIAL = 256

QWEN2_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]")
NVILA_MEDIA = ("<vila/sentinel>", "<image>", "<vila/video>")
"""Above the vocabulary: their places hold embeddings of media, never their own."""
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant"
    "<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] "
    "+ '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Llama3Kind(TokenizerKind):
    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        names, reserved = [], 0
        for index in range(LLAMA_3_SPECIAL):
            if index in LLAMA_3_NAMED:
                names.append(LLAMA_3_NAMED[index])
            else:
                names.append(f"<|reserved_special_token_{reserved}|>")
                reserved += 1
        tokenizer = _tokenizer(vocabulary)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        begin, end, turn = vocabulary, vocabulary + 1, vocabulary + 9
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{names[0]} $A", special_tokens=[(names[0], begin)]
            ),
        ])  # fmt: skip
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {"bos_token": names[0], "eos_token": names[1]}
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer_config.json", {
            **special, "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(vocabulary + index): added_token(name) for index, name in enumerate(names)
            },
            "clean_up_tokenization_spaces": True, "model_max_length": context_length,
            "model_input_names": ["input_ids", "attention_mask"],
        })  # fmt: skip
        return WrittenTokenizer(
            vocabulary + len(names), bos=begin, eos=end, pad=None, generation_eos=(end, turn)
        )


class Qwen2Kind(TokenizerKind):
    """Qwen2's as NVILA extends it."""

    def write(
        self, folder: Path, vocabulary: int, context_length: int, framed: bool
    ) -> WrittenTokenizer:
        tokenizer = _tokenizer(vocabulary)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        names = [*QWEN2_TOKENS, *NVILA_MEDIA]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        tokenizer.save(str(folder / "tokenizer.json"))
        state = json.loads(tokenizer.to_str())["model"]
        write_json(folder / "vocab.json", state["vocab"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
        )
        ids = {name: vocabulary + index for index, name in enumerate(names)}
        write_json(folder / "added_tokens.json", ids)
        special = {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "bos_token": "[BOS]"}
        write_json(folder / "special_tokens_map.json", {
            **special, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        })  # fmt: skip
        write_json(folder / "tokenizer_config.json", {
            **special, "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False,
            "added_tokens_decoder": {str(index): added_token(name) for name, index in ids.items()},
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": CHATML,
            "clean_up_tokenization_spaces": False, "errors": "replace", "legacy": False,
            "model_max_length": context_length, "padding_side": "right", "split_special_tokens":
            False, "unk_token": None,
        })  # fmt: skip
        return WrittenTokenizer(
            vocabulary + len(QWEN2_TOKENS),
            bos=None,
            eos=ids["<|im_end|>"],
            pad=ids["[PAD]"],
            image=ids["<image>"],
            generation_eos=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        )


def _tokenizer(vocabulary: int) -> Tokenizer:
    """Trained, then filled up to `vocabulary` with tokens that no merge leads to."""
    state = json.loads(_trained())
    known = state["model"]["vocab"]
    fillers = (f"{SPACE}{word}" for word in filler_words() if f"{SPACE}{word}" not in known)
    missing = vocabulary - len(known)
    if missing < 0:
        raise ValueError(f"a vocabulary of {vocabulary} is below {len(known)}")
    known |= {word: len(known) + index for index, word in enumerate(islice(fillers, missing))}
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(WORDS, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=TRAINED_TOKENS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return str(tokenizer.to_str())
