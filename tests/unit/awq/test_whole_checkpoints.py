"""Whole checkpoints, whose 4-bit weights are written anew in every format, answer alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models import SamplingParams, load_engine
from models.awq.formats import FORMATS
from models.checkpoints import open_checkpoint
from tests.checkpoint_files import Tensors
from tests.tiny import write_tiny_llava, write_tiny_vila
from tests.unit.awq.rewriting import as_own_files, as_torch_file, in_format, take_awq

GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
PICTURE = Image.radial_gradient("L").resize((40, 28)).convert("RGB")
WRITERS = {"llava": write_tiny_llava, "vila": write_tiny_vila}


def tokens(folder: Path) -> list[int]:
    with load_engine(
        folder, precision="W4A16", device="cpu", dtype="float32", num_threads=1
    ) as engine:
        deltas = engine.generate(PROMPT, [PICTURE], GREEDY)
        return [token for delta in deltas for token in delta.token_ids]


def write(layout: str, folder: Path, group: int) -> tuple[Path, Tensors]:
    """A checkpoint without 4-bit weights, and those."""
    WRITERS[layout](folder, awq_only=True, group_size=group)
    return folder, take_awq(folder)


@pytest.mark.parametrize(
    ("layout", "symmetric", "group"),
    [("llava", False, 32), ("llava", False, 128), ("llava", True, 64), ("vila", False, 128),
     ("vila", True, 32)],
)  # fmt: skip
def test_every_format_gives_the_same_tokens(
    layout: str, symmetric: bool, group: int, tmp_path: Path
) -> None:
    """The `.pt` formats in a file of that kind, the others as the checkpoint's own safetensors."""
    answers = {}
    for name in FORMATS:
        if FORMATS[name].symmetric and not symmetric:
            continue
        folder, v2 = write(layout, tmp_path / name, group)
        place = as_torch_file if name.startswith("llm-awq") else as_own_files
        place(folder, in_format(v2, name, symmetric=symmetric))
        answers[name] = tokens(folder)
    assert len(answers) == (6 if symmetric else 5)
    expected = answers["llm-awq-v2"]
    assert len(expected) == 24 and len(set(expected)) > 2, "an answer that hangs on the weights"
    assert all(answer == expected for answer in answers.values()), answers


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_quantised_comes_from_the_awq_file(name: str, tmp_path: Path) -> None:
    """Norms above all: AWQ folds its scales into them."""
    folder = write_tiny_llava(tmp_path / "tiny")
    tensors = in_format(take_awq(folder), name, symmetric=FORMATS[name].symmetric)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    as_torch_file(folder, tensors)
    language = open_checkpoint(folder).language
    assert torch.equal(language.get("model.norm.weight"), tensors["model.norm.weight"])
    assert language.file_of("lm_head.weight") == "weights.pt"
