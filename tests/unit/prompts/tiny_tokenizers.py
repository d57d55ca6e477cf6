"""Folders with tiny tokenizers of every kind that the supported families have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AddedToken, LlamaTokenizer

from tests.tiny import TOKENIZER_TEXT, tokenizer_model

TEXTS = TOKENIZER_TEXT + "Grüße, 猫と犬! 12345 it's they'RE\n\n\n  indented\ttabs\r\n"
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = GPT4_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@cache
def _byte_level_json(split: str | None, nfc: bool) -> str:
    """Byte-level BPE with 100-odd merges: GPT-2's split, or another."""
    fast = FastTokenizer(models.BPE())
    if nfc:
        fast.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    fast.pre_tokenizer = (
        byte_level
        if split is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                byte_level,
            ]
        )
    )
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        TEXTS.split("\n"),
        trainers.BpeTrainer(
            vocab_size=380, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return str(fast.to_str())


def byte_level(split: str | None = None, *, nfc: bool = False) -> FastTokenizer:
    return FastTokenizer.from_str(_byte_level_json(split, nfc))


def _specials(names: tuple[str, ...], first: int) -> dict[str, dict[str, Any]]:
    traits = {
        "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
        "special": True,
    }  # fmt: skip
    return {str(first + index): {"content": name, **traits} for index, name in enumerate(names)}


def write_llama_3(folder: Path) -> FastTokenizer:
    """VILA1.5-8B's: only a tokenizer.json, which puts the beginning of sequence first."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = byte_level(GPT4_SPLIT)
    fast.add_special_tokens([AddedToken(n, normalized=False) for n in LLAMA_3_SPECIAL])
    bos = LLAMA_3_SPECIAL[0]
    fast.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        ),
    ])  # fmt: skip
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos,
        "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
        "added_tokens_decoder": _specials(LLAMA_3_SPECIAL, fast.token_to_id(bos)),
    })  # fmt: skip
    ends = [fast.token_to_id("<|end_of_text|>"), fast.token_to_id("<|eot_id|>")]
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return fast


def write_qwen2(
    folder: Path, *, vocabulary_files: bool = True, media: tuple[str, ...] = ()
) -> FastTokenizer:
    """NVILA's: vocab.json and merges.txt, or a tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = byte_level(QWEN_SPLIT, nfc=True)
    names = (*QWEN_SPECIAL, *media)
    first = fast.get_vocab_size()
    if vocabulary_files:
        model = json.loads(fast.to_str())["model"]
        write_json(folder / "vocab.json", model["vocab"])
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if not vocabulary_files:
        fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "errors": "replace",
        "model_max_length": 8192, "added_tokens_decoder": _specials(names, first),
    })  # fmt: skip
    return fast


def write_gpt2(folder: Path) -> FastTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    fast = byte_level()
    model = json.loads(fast.to_str())["model"]
    fast.add_special_tokens(["<|endoftext|>"])
    write_json(folder / "vocab.json", {**model["vocab"], "<|endoftext|>": len(model["vocab"])})
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    })  # fmt: skip
    return fast


def write_llava_hf(folder: Path, *, legacy: bool = False) -> None:
    """llava-hf's: Llama's, in transformers' own format, with `<image>` and `<pad>` added."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(tokenizer_model())
    tokenizer = LlamaTokenizer.from_pretrained(source, legacy=legacy, add_bos_token=True)
    tokenizer.add_tokens(
        [AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True)]
    )
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    (source / "tokenizer.model").rename(folder / "tokenizer.model")
    source.rmdir()
