"""LLaVA-1.6: what transformers' LLaVA-NeXT answers about pictures of any shape, ours answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from models.checkpoints import open_checkpoint
from models.errors import CheckpointError
from models.vision import load_vision
from tests.checkpoint_files import rewrite_json, rewrite_tensors
from tests.parity.hf import as_flat, respell, text_configs, write_hf
from tests.parity.test_hf import QUESTIONS, check_equal
from tests.parity.test_tokens import picture
from tests.tiny import TOKENIZER_TEXT

SHAPES = [(90, 40), (35, 80), (64, 64), (200, 20), (20, 300), (7, 5), (33, 31), (640, 480)]
"""Of pictures: each of the pinpoints' shapes, thin strips, and smaller than a tile."""


def test_questions_with_pictures_of_any_shape_are_answered_alike(tmp_path: Path) -> None:
    reference = write_hf(tmp_path / "hf", text_configs()["llama"], tiles=True)
    questions = [("<image>\nWhat is this?", (picture(*size, seed),))
                 for seed, size in enumerate(SHAPES)]  # fmt: skip
    check_equal(tmp_path / "hf", reference, questions=questions, length=2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_each_family_answers_as_transformers(family: str, tmp_path: Path) -> None:
    """Without pictures, with one and with three; and the flat layout of the same weights alike."""
    reference = write_hf(tmp_path / "hf", text_configs()[family], tiles=True)
    check_equal(tmp_path / "hf", reference)
    as_flat(tmp_path / "hf", tmp_path / "flat")
    check_equal(tmp_path / "flat", reference)


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_tensors_may_have_their_old_or_new_names(spelling: str, tmp_path: Path) -> None:
    reference = write_hf(tmp_path / "hf", text_configs()["mistral"], tiles=True)
    respell(tmp_path / "hf", spelling)  # type: ignore[arg-type]
    check_equal(tmp_path / "hf", reference, questions=QUESTIONS[1:2])


def write_llama_like_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A leading space for the whole text only, as Llama's: a text cut at `<image>` has others."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT.strip().split("\n"), trainer)
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def test_a_prompt_is_tokenised_as_a_whole(tmp_path: Path) -> None:
    reference = write_hf(
        tmp_path / "hf", text_configs()["llama"], tiles=True, tokenizer=write_llama_like_tokenizer
    )
    tokenizer = reference.processor.tokenizer
    prompt = QUESTIONS[2][0]
    pieces = [
        tokenizer.encode(piece, add_special_tokens=False) for piece in prompt.split("<image>")
    ]
    whole = tokenizer.encode(prompt, add_special_tokens=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert whole != [*pieces[0], *(t for piece in pieces[1:] for t in [image, *piece])]
    check_equal(tmp_path / "hf", reference)


@pytest.mark.parametrize("layout", ["hf", "flat"])
def test_the_newline_behind_each_row_must_be_there_and_fit(layout: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", text_configs()["llama"], tiles=True)
    as_flat(tmp_path / "hf", tmp_path / "flat")
    name = "image_newline" if layout == "hf" else "model.image_newline"
    folder, file = tmp_path / layout, "model.safetensors"
    load(folder)
    rewrite_tensors(folder / file, lambda tensors: tensors.update({name: torch.zeros(127)}))
    with pytest.raises(CheckpointError, match=rf"^projector: {name} in {file} has shape \(127,\)"):
        load(folder)
    rewrite_tensors(folder / file, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"^projector: {name} is missing from {file}"):
        load(folder)


def load(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, precision="W16A16")
    load_vision(checkpoint, torch.device("cpu"), torch.float32)


def test_pinpoints_of_the_processor_and_the_model_must_agree(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", text_configs()["llama"], tiles=True)
    spec = open_checkpoint(tmp_path / "hf", precision="W16A16").spec
    assert spec.vision.preprocessing.grid_pinpoints[0] == (64, 32), "width first"
    assert (spec.vision.preprocessing.mode, spec.projector.merge) == ("anyres", "spatial_unpad")
    rewrite_json(tmp_path / "hf/config.json", image_grid_pinpoints=[[32, 64]])
    with pytest.raises(CheckpointError, match="image_grid_pinpoints is .*; it must be as in conf"):
        open_checkpoint(tmp_path / "hf", precision="W16A16")


def test_llavas_ways_to_join_tiles_are_read(tmp_path: Path) -> None:
    """Of which only spatial_unpad has a newline; "flat" is the default."""
    write_hf(tmp_path / "hf", text_configs()["llama"], tiles=True)
    as_flat(tmp_path / "hf", tmp_path / "flat")
    config = tmp_path / "flat/config.json"
    for merge in ("spatial_unpad", "spatial", "flat", None):
        rewrite_json(config, mm_patch_merge_type=merge)
        checkpoint = open_checkpoint(tmp_path / "flat", precision="W16A16")
        assert checkpoint.spec.projector.merge == (merge or "flat")
        assert ("image_newline" in checkpoint.projector.names()) == (merge == "spatial_unpad")
    rewrite_json(config, mm_patch_merge_type="maxpool2x2")
    with pytest.raises(CheckpointError, match="mm_patch_merge_type is 'maxpool2x2'; known: flat"):
        open_checkpoint(tmp_path / "flat", precision="W16A16")
