"""transformers' own layout: what transformers saves is served with the tokens it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlavaImageProcessorPil

from models import SamplingParams, load_engine
from models.awq.formats import FORMATS
from models.awq.quantize import quantize_rtn
from tests.checkpoint_files import Tensors, read_tensors, rewrite_json, write_tensors
from tests.parity.hf import (
    VOCABULARY,
    HfReference,
    Spelling,
    as_flat,
    flat_name,
    respell,
    text_configs,
    write_hf,
)
from tests.parity.test_tokens import SQUARE, TALL, WIDE, Question, record_logits

LENGTH = 32
ATOL = 1e-4
QUESTIONS: list[Question] = [
    ("USER: Is there a dog? ASSISTANT:", ()),
    ("USER: <image>\nWhat is shown in this image? ASSISTANT:", (WIDE,)),
    ("USER: <image>\n<image> and <image>\nCompare  them. ASSISTANT:", (TALL, SQUARE, WIDE)),
]
every_family = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])


def answer(
    folder: Path, questions: Sequence[Question], length: int, precision: str
) -> list[tuple[list[int], torch.Tensor]]:
    """Of our engine in fp32: the tokens, and the logits behind them."""
    params = SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True)
    with load_engine(
        folder, precision=precision, device="cpu", dtype="float32", num_threads=1  # type: ignore[arg-type]
    ) as engine:  # fmt: skip
        recorded = record_logits(engine)
        out = []
        for number, question in enumerate(questions):
            deltas = list(engine.generate(*question, params, request_id=str(number)))
            tokens = [token for delta in deltas for token in delta.token_ids]
            out.append((tokens, torch.stack(recorded[str(number)])))
    return out


def check_equal(
    folder: Path,
    reference: HfReference,
    precision: str = "W16A16",
    *,
    questions: Sequence[Question] = QUESTIONS,
    length: int = LENGTH,
) -> None:
    """Identical greedy tokens, and logits within 1e-4."""
    expected = [reference.answer(*question, length) for question in questions]
    assert len({logits.numpy().tobytes() for _, logits in expected}) == len(questions), (
        "they are told apart"
    )
    got = answer(folder, questions, length, precision)
    for (tokens, logits), (right_tokens, right_logits) in zip(got, expected, strict=True):
        assert logits.shape == (length, VOCABULARY)
        assert (logits - right_logits).abs().max() < ATOL
        assert tokens == right_tokens


@every_family
def test_each_family_answers_as_transformers(family: str, tmp_path: Path) -> None:
    """Without pictures, with one and with three; and the flat layout of the same weights alike."""
    reference = write_hf(tmp_path / "hf", text_configs()[family])
    check_equal(tmp_path / "hf", reference)
    as_flat(tmp_path / "hf", tmp_path / "flat")
    check_equal(tmp_path / "flat", reference)


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_tensors_may_have_their_old_or_new_names(spelling: Spelling, tmp_path: Path) -> None:
    reference = write_hf(tmp_path / "hf", text_configs()["llama"])
    respell(tmp_path / "hf", spelling)
    check_equal(tmp_path / "hf", reference)


def test_a_processor_that_pads_is_followed(tmp_path: Path) -> None:
    reference = write_hf(tmp_path / "hf", text_configs()["llama"])
    unpadded = reference.answer(*QUESTIONS[1], 1)[1]
    reference.processor.image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    reference.processor.save_pretrained(tmp_path / "hf")
    assert (reference.answer(*QUESTIONS[1], 1)[1] - unpadded).abs().max() > 0.1
    check_equal(tmp_path / "hf", reference)


@pytest.mark.parametrize(
    ("family", "place", "kind"),
    [
        ("llama", "safetensors", "autoawq-gemm"),
        ("qwen2", "safetensors", "compressed-tensors"),
        ("mistral", "pt", "llm-awq-v2"),
        ("qwen2", "flat pt", "llm-awq-v2"),
    ],
)
def test_4_bit_weights_under_transformers_names_answer_as_dequantised(
    family: str, place: str, kind: str, tmp_path: Path
) -> None:
    """Among the other tensors; in a file beside them; and there under LLaVA's own names."""
    folder = tmp_path / "hf"
    reference = write_hf(folder, text_configs()[family])
    tensors = read_tensors(folder / "model.safetensors")
    packed: Tensors = {}
    for name in [n for n in tensors if n.startswith("language_model.model.layers.")]:
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and layer.endswith("proj"):
            weight = quantize_rtn(tensors.pop(name), group_size=64)
            linear = reference.model.get_submodule(
                layer.replace("language_model.model.", "model.language_model.")
            )
            linear.weight.data = weight.dequantize(torch.float32)  # type: ignore[union-attr, operator]
            layers = FORMATS[kind].pack(weight, torch.float32)
            packed |= {f"{layer}.{suffix}": value for suffix, value in layers.items()}
    if place == "safetensors":
        write_tensors(folder, {**tensors, **packed})
    else:
        language = {n: t for n, t in tensors.items() if n.startswith("language_model.")} | packed
        flat = place == "flat pt"
        torch.save(
            {flat_name(n) if flat else n: t for n, t in language.items()},
            folder / "tiny-w4-g64-awq-v2.pt",
        )
        write_tensors(folder, {n: t for n, t in tensors.items() if n not in language})
    check_equal(folder, reference, "W4A16")


def test_keys_that_have_their_familys_default_may_be_left_out(tmp_path: Path) -> None:
    """As in the released files, where transformers wrote only what differs."""
    reference = write_hf(tmp_path / "hf", text_configs()["llama"])
    path = tmp_path / "hf/config.json"
    text = json.loads(path.read_text())["text_config"]
    kept = {
        key: text[key]
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        )
    }  # fmt: skip
    rewrite_json(path, text_config=kept)
    check_equal(tmp_path / "hf", reference)
