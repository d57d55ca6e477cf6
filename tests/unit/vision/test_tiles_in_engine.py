"""Pictures of several tiles, from the prompt to the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from models import SamplingParams, load_engine
from tests.checkpoint_files import rewrite_json
from tests.tiny import write_tiny_llava
from tests.unit.vision.test_anyres import noise

PARAMS = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
SIZES = [(64, 64), (90, 20), (20, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llava(tmp_path_factory.mktemp("anyres") / "tiny", awq=False)
    rewrite_json(
        folder / "config.json", image_aspect_ratio="anyres", mm_patch_merge_type="flat",
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
    )  # fmt: skip
    return folder


def answers(folder: Path, max_num_batched_tokens: int, cache: int) -> tuple[list[str], list[int]]:
    """Of each picture by itself, of all in one prompt, and of all that at once."""
    images: list[Image.Image] = [noise(*size) for size in SIZES]
    prompts = [("What is <image>\nthis?", [image]) for image in images]
    prompts.append(("Compare <image> with <image> and <image>\nnow", images))
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1,
        max_num_batched_tokens=max_num_batched_tokens, image_cache_bytes=cache,
        enable_prefix_caching=False, kv_cache_bytes=8 << 20,
    ) as engine:  # fmt: skip
        alone, lengths = [], []
        for prompt, pictures in prompts:
            deltas = list(engine.generate(prompt, pictures, PARAMS))
            alone.append("".join(delta.text for delta in deltas))
            lengths.append(deltas[-1].usage.prompt_tokens)
        assert engine.generate_batch(prompts, PARAMS) == alone
    return alone, lengths


def test_answers_depend_neither_on_company_nor_on_how_the_prompt_is_cut(folder: Path) -> None:
    whole, lengths = answers(folder, 512, cache=1 << 20)
    assert answers(folder, 24, cache=0) == (whole, lengths)  # cut inside pictures, none kept
    assert len(set(whole)) == len(whole)
    # 5, 4 and 4 tiles of 16 tokens.
    assert lengths[0] - lengths[1] == 16 and lengths[1] == lengths[2]
    assert lengths[3] > 13 * 16
