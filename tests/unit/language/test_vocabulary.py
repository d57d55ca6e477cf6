"""A tokenizer with tokens that the model has no embeddings for is another model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from models import load_engine
from models.errors import CheckpointError, InvalidRequest
from models.language.vocabulary import check_vocabulary
from models.prompts import Tokenizer
from tests.checkpoint_files import rewrite_json, rewrite_tensors
from tests.tiny import write_tiny_llava


class Words(Tokenizer):
    """Only as large as it is said to be, with some tokens added at its end."""

    bos_token_id = None
    eos_token_ids = ()

    def __init__(self, size: int, added: Sequence[str] = ()) -> None:
        self.vocab_size = size + len(added)
        self._added = {token: size + i for i, token in enumerate(added)}

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError

    def token_to_id(self, token: str) -> int | None:
        return self._added.get(token)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [
        (Words(32000), 32000),
        (Words(32002, ["<image>", "<pad>"]), 32064),  # llava-hf: padded to a multiple of 64
        (Words(151646), 151936),  # Qwen2
        (Words(151648, ["<vila/sentinel>", "<image>", "<vila/video>"]), 151648),  # NVILA
        (Words(32000, ["<im_patch>"]), 32000),  # LLaVA's code adds it at load
    ],
)
def test_a_vocabulary_may_be_larger_and_tokens_for_pictures_lie_behind_it(
    tokenizer: Tokenizer, vocab_size: int
) -> None:
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [
        (Words(32001), 32000),
        (Words(32000, ["<im_start>", "<im_end>"]), 32000),
        (Words(151648, ["<image>", "<else>"]), 151648),
        (Words(151648, ["<image>"]), 151000),
    ],
)
def test_a_smaller_one_is_an_error_that_names_both_sizes(
    tokenizer: Tokenizer, vocab_size: int
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_vocabulary(tokenizer, Qwen2Config(vocab_size=vocab_size))
    assert f"has {tokenizer.vocab_size} tokens" in str(caught.value)
    assert f"vocabulary is smaller: {vocab_size} (vocab_size" in str(caught.value)


def shrink(folder: Path, vocab_size: int) -> None:
    rewrite_json(folder / "config.json", vocab_size=vocab_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rewrite_tensors(
            folder / "model.safetensors",
            lambda tensors, name=name: tensors.update({name: tensors[name][:vocab_size]}),
        )


def test_a_checkpoint_with_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", awq=False)
    shrink(folder, 399)
    with pytest.raises(CheckpointError, match=r"has 400 tokens, .* is smaller: 399 \(vocab_size"):
        load_engine(folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1)


def test_a_prompt_with_a_token_behind_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """A client's text may name a token that only other media have; the engine goes on."""
    folder = write_tiny_llava(tmp_path / "tiny", awq=False)
    (folder / "added_tokens.json").write_text('{"<vila/video>": 400}')
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1
    ) as engine:
        with pytest.raises(InvalidRequest, match="prompt: holds the token '<vila/video>', which"):
            list(engine.generate("What is in <vila/video>?"))
        assert list(engine.generate("What is in it?"))
