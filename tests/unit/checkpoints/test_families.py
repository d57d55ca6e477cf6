"""Every family in every format: written tiny, opened, and asked about a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from models import SamplingParams, load_engine
from models.checkpoints.synthesis import FAMILIES, OUTPUT_FORMATS, synthesize
from models.engine.engine import Engine

PROMPT = "USER: <image>\nWhat is shown here? ASSISTANT:"
ALIKE = {"llava-v1.5-13b", "vila-7b", "vila1.5-13b", "nvila-lite-8b-resize"}
"""Tiny, these are another family with another projector or dtype at most: two formats will do."""
CASES = [
    (family, name)
    for family in FAMILIES
    for name in OUTPUT_FORMATS
    if family not in ALIKE or name in {"16bit", "llm-awq-v2"}
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_answers_by_the_picture(family: str, name: str, tmp_path: Path) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=[name])
    engine = load_engine(
        folder,
        precision="W16A16" if name == "16bit" else "W4A16",
        device="cpu",
        dtype="float32",
        kv_cache_bytes=1 << 22,
        num_threads=1,
    )
    try:
        answers = [_answer(engine, _picture(colour)) for colour in ("red", "blue")]
    finally:
        engine.close()
    assert all(answers)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("naming", ["saved", "modules"])
@pytest.mark.parametrize("family", ["llava-1.5-7b-hf", "llava-v1.6-mistral-7b-hf"])
def test_names_of_transformers_tensors_change_nothing(
    family: str, naming: str, tmp_path: Path
) -> None:
    answers = []
    for index, names in enumerate(("released", naming)):
        (folder,) = synthesize(
            family, tmp_path / f"{index}" / family, formats=["16bit"], naming=names
        )
        engine = load_engine(
            folder, precision="W16A16", device="cpu", dtype="float32", kv_cache_bytes=1 << 22
        )
        answers.append(_answer(engine, _picture("red")))
        engine.close()
    assert answers[0] == answers[1]


def _answer(engine: Engine, picture: Image.Image) -> list[int]:
    params = SamplingParams(temperature=0, max_new_tokens=8)
    deltas = engine.generate(PROMPT, images=[picture], params=params)
    return [token for delta in deltas for token in delta.token_ids]


def _picture(colour: str) -> Image.Image:
    """Upright, and off the middle, so that tiles and padding differ."""
    image = Image.new("RGB", (40, 60), "white")
    ImageDraw.Draw(image).ellipse((4, 6, 30, 34), fill=colour)
    return image
