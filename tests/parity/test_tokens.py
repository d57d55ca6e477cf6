"""In fp32 the engine answers with exactly the tokens of transformers' models, however batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import Engine, SamplingParams, load_engine
from models.engine.sequence import Sequence as EngineSequence
from tests.parity.references import VOCABULARY, Llava, Reference, Vila
from tests.tiny import write_tiny_llava, write_tiny_vila
from tests.unit.engine.harness import core_of

LENGTH = 12
GREEDY = SamplingParams(temperature=0, max_new_tokens=LENGTH, ignore_eos=True)
ATOL = 1e-4
Question = tuple[str, Sequence[Image.Image]]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A few coloured rectangles: smooth enough to be resized, different for each seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(4):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        image.paste(tuple(rng.integers(0, 256, 3).tolist()), (left, top, width, height))
    return image


WIDE, TALL, SQUARE = picture(90, 40, 1), picture(35, 80, 2), picture(64, 64, 3)
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "
QUESTIONS: list[Question] = [
    (f"{SYSTEM}USER: Is there a dog? ASSISTANT:", ()),
    (f"{SYSTEM}USER: <image>\nWhat is shown in this image? ASSISTANT:", (WIDE,)),
    (f"{SYSTEM}USER: <image>\nWhat is shown in this image? ASSISTANT:", (TALL,)),
    (f"{SYSTEM}USER: <image>\n<image>\nCompare  them. ASSISTANT:", (SQUARE, WIDE)),
    (f"{SYSTEM}USER: <image>\nHow many? ASSISTANT: Three.</s>USER: Where? ASSISTANT:", (SQUARE,)),
    ("<image>", (TALL,)),
]


@dataclass(frozen=True)
class Case:
    layout: Literal["llava", "vila"]
    precision: Literal["W4A16", "W16A16"]
    written: dict[str, Any]
    """How the checkpoint is written, beside the defaults."""

    def write(self, parent: Path) -> Path:
        write = write_tiny_llava if self.layout == "llava" else write_tiny_vila
        return write(parent / "tiny", **self.written)

    def reference(self, folder: Path) -> Reference:
        quantized = self.precision == "W4A16"
        group = self.written.get("group_size", 128)
        if self.layout == "vila":
            return Vila(folder, quantized=quantized, group=group)
        pad = self.written.get("image_aspect_ratio", "pad") == "pad"
        return Llava(folder, quantized=quantized, pad=pad, group=group)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.written.items())
        return f"{self.layout}-{self.precision}-{options}"


CASES = [
    Case("llava", "W16A16", {}),
    Case("llava", "W16A16", {"image_aspect_ratio": None, "kv_heads": 4, "seed": 1}),
    Case("llava", "W4A16", {}),
    Case("llava", "W4A16", {"group_size": 64, "dtype": torch.bfloat16, "bias": True, "seed": 2}),
    Case("vila", "W16A16", {}),
    Case("vila", "W4A16", {}),
    Case("vila", "W4A16", {"group_size": 32, "kv_heads": 2, "seed": 3}),
]


def load(folder: Path, precision: Literal["W4A16", "W16A16"], **options: Any) -> Engine:
    return load_engine(
        folder, precision=precision, device="cpu", dtype="float32", num_threads=1, **options
    )


def tokens_of(engine: Engine, question: Question) -> list[int]:
    return [token for delta in engine.generate(*question, GREEDY) for token in delta.token_ids]


def record_logits(engine: Engine) -> dict[str, list[Tensor]]:
    """From now on, the logits behind every token, by request."""
    recorded: dict[str, list[Tensor]] = {}
    sample = core_of(engine).sampler.sample

    def sampled(logits: Tensor, seqs: Sequence[EngineSequence]) -> list[int]:
        for row, seq in zip(logits, seqs, strict=True):
            recorded.setdefault(seq.request_id, []).append(row.clone())
        return sample(logits, seqs)

    core_of(engine).sampler.sample = sampled  # type: ignore[method-assign]
    return recorded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_and_logits_equal_the_reference(case: Case, tmp_path: Path) -> None:
    folder = case.write(tmp_path)
    reference = case.reference(folder)
    expected = [reference.answer(*question, LENGTH) for question in QUESTIONS]
    assert len({tuple(tokens) for tokens, _ in expected}) == len(QUESTIONS), "they tell them apart"

    with load(folder, case.precision) as engine:  # one by one
        recorded = record_logits(engine)
        for number, (question, (tokens, logits)) in enumerate(
            zip(QUESTIONS, expected, strict=True)
        ):
            deltas = list(engine.generate(*question, GREEDY, request_id=str(number)))
            assert [token for delta in deltas for token in delta.token_ids] == tokens
            got = torch.stack(recorded[str(number)])
            assert got.shape == (LENGTH, VOCABULARY)
            assert (got - logits).abs().max() < ATOL

    # All at once, twice, in small chunks and blocks that do not suffice for all of them.
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 20, "block_size": 8}
    with load(
        folder, case.precision, kv_cache_bytes=400 * _bytes_per_token(case), **options
    ) as engine:
        texts = engine.generate_batch([*QUESTIONS, *QUESTIONS], GREEDY)
        answers = [engine._preparer.tokenizer.decode(tokens) for tokens, _ in expected]
        assert texts == answers * 2
        assert engine.stats().prefix_hit_tokens > 0 and engine.stats().blocks_used == 0


def _bytes_per_token(case: Case) -> int:
    """Of the KV cache: two layers, heads of 64, fp32, keys and values."""
    return 2 * 2 * case.written.get("kv_heads", 2 if case.layout == "llava" else 4) * 64 * 4


def test_vilas_order_of_tokens_decides_the_answer(tmp_path: Path) -> None:
    """Column by column for VILA-1.5; row by row where it is asked for."""
    folder = write_tiny_vila(tmp_path / "tiny")
    wanted = {
        order: [Vila(folder, quantized=False, order=order).answer(*question, LENGTH)[0]
                for question in QUESTIONS[1:4]]
        for order in ("column", "row")
    }  # fmt: skip
    assert wanted["column"] != wanted["row"]

    def got(**options: Any) -> list[list[int]]:
        with load(folder, "W16A16", **options) as engine:
            return [tokens_of(engine, question) for question in QUESTIONS[1:4]]

    assert got() == wanted["column"]
    assert got(token_order="row") == wanted["row"]


def test_the_second_turn_reads_the_first_from_the_cache_and_answers_alike(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny")
    reference = Llava(folder, quantized=True, pad=True)
    with load(folder, "W4A16", block_size=8) as engine:
        prompt, pictures = QUESTIONS[1]
        first = "".join(delta.text for delta in engine.generate(prompt, pictures, GREEDY))
        second = f"{prompt} {first}</s>USER: Are you sure? ASSISTANT:"
        deltas = list(engine.generate(second, pictures, GREEDY))
        assert deltas[-1].usage.cached_tokens > 16
        got = [token for delta in deltas for token in delta.token_ids]
    assert got == reference.answer(second, pictures, LENGTH)[0]
