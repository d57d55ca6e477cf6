"""Which parts go to which GPU, by memory that is made up; and on GPUs, if there are two."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from models import SamplingParams, load_engine, loading
from models.checkpoints import open_checkpoint
from models.checkpoints.skeleton import decoder_skeleton, vision_skeleton
from models.checkpoints.synthesis import synthesize
from models.device_map import Skeleton, choose_placement, place
from models.engine.options import EngineOptions
from models.errors import ConfigurationError
from models.language.decoder import Decoder
from models.placement import Placement

GIB = 2**30
HIDDEN, INNER, LAYERS, VOCAB, CONTEXT = 4096, 11008, 32, 32000, 4096
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)
TABLE_BYTES = 2 * VOCAB * HIDDEN
LAYER_KV_BYTES = 2 * 2 * CONTEXT * HIDDEN


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (folder,) = synthesize("llava-v1.5-7b", tmp_path_factory.mktemp("map") / "llava-tiny")
    return folder


@pytest.fixture
def seven_b(checkpoint: Path) -> Skeleton:
    """LLaVA-1.5-7B's decoder in 16 bits, 12.6 GiB, and 2 GiB of KV cache; a tiny tower."""
    vision = vision_skeleton(open_checkpoint(checkpoint, precision="W16A16"), torch.bfloat16)
    return Skeleton(vision, _decoder(), LAYER_KV_BYTES)


@cache
def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=VOCAB,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip


def _decoder() -> Decoder:
    with torch.device("meta"):
        return Decoder(_config()).to(torch.bfloat16)


def gpus(*gib: float) -> dict[torch.device, int]:
    return {torch.device("cuda", index): int(size * GIB) for index, size in enumerate(gib)}


def used(placement: Placement) -> dict[torch.device, int]:
    """Bytes on each device, less the tower's."""
    counts = Counter(placement.layers)
    layers = {device: count * (LAYER_BYTES + LAYER_KV_BYTES) for device, count in counts.items()}
    for device in (placement.embedding, placement.head):
        layers[device] = layers.get(device, 0) + TABLE_BYTES
    return layers


def test_what_is_measured_is_what_the_model_takes(seven_b: Skeleton) -> None:
    own = LAYERS * LAYER_BYTES + 2 * TABLE_BYTES + 2 * HIDDEN
    tower = sum(t.nbytes for t in (*seven_b.vision.parameters(), *seven_b.vision.buffers()))
    assert seven_b.weight_bytes == own + tower
    assert seven_b.kv_bytes == LAYERS * LAYER_KV_BYTES


@pytest.mark.parametrize("device_map", ["auto", "single"])
def test_what_fits_one_gpu_stays_on_the_first(seven_b: Skeleton, device_map: str) -> None:
    memory = gpus(16, 80)
    placement = place(seven_b, memory, device_map)  # type: ignore[arg-type]
    assert placement == Placement.single(torch.device("cuda", 0), LAYERS)


def test_a_kv_cache_that_does_not_fit_beside_the_weights_has_the_model_spread(
    seven_b: Skeleton,
) -> None:
    assert len(place(seven_b, gpus(14, 14), "auto").devices) == 2
    assert len(place(seven_b, gpus(14, 14), "single").devices) == 1, "with a smaller KV cache"
    without = Skeleton(seven_b.vision, _decoder(), 0)
    assert len(place(without, gpus(14, 14), "auto").devices) == 1


@pytest.mark.parametrize("sizes", [(9, 9), (10, 10, 10), (4, 4, 4, 4, 4), (24, 24)])
def test_layers_lie_in_order_and_no_gpu_gets_more_than_it_has(
    seven_b: Skeleton, sizes: tuple[float, ...]
) -> None:
    memory = gpus(*sizes)
    placement = place(seven_b, memory, "balanced")
    order = [device.index for device, _ in groupby(placement.layers)]
    assert order == sorted(set(order)) and len(order) == len(sizes)
    assert (placement.vision.index, placement.embedding.index) == (0, 0)
    assert (placement.norm.index, placement.head.index) == (len(sizes) - 1,) * 2
    assert all(taken <= memory[device] for device, taken in used(placement).items())


def test_a_balanced_map_leaves_the_gpus_about_equally_full(seven_b: Skeleton) -> None:
    first, second = used(place(seven_b, gpus(80, 80), "balanced")).values()
    assert abs(first - second) <= 4 * (LAYER_BYTES + LAYER_KV_BYTES)


def test_a_small_gpu_gets_fewer_layers(seven_b: Skeleton) -> None:
    counts = Counter(place(seven_b, gpus(4, 16), "auto").layers)
    assert 0 < counts[torch.device("cuda", 0)] < counts[torch.device("cuda", 1)]


def test_very_unequal_gpus_are_filled_as_far_as_they_go(seven_b: Skeleton) -> None:
    memory = gpus(12, 2.5, 2.5)
    placement = place(seven_b, memory, "auto")
    assert all(taken <= memory[device] for device, taken in used(placement).items())


def test_a_gpu_that_others_have_filled_gets_nothing(seven_b: Skeleton) -> None:
    placement = place(seven_b, gpus(9, -1, 9), "auto")
    assert torch.device("cuda", 1) not in placement.devices


def test_too_large_for_all_of_them_says_how_much_is_needed_and_there(seven_b: Skeleton) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"weights take 12\.6 GiB and the KV cache of one request 2\.0, and cuda:0, cuda:1 "
        r"have 6\.0 \+ 5\.5 GiB for them.*W4A16.*max_model_len.*more GPUs",
    ):
        place(seven_b, gpus(6, 5.5), "auto")


def test_too_large_for_the_only_one(seven_b: Skeleton) -> None:
    with pytest.raises(ConfigurationError, match=r"cuda:0 has 12\.0 GiB.*or several GPUs"):
        place(seven_b, gpus(12), "auto")
    assert place(seven_b, gpus(12.7), "auto").devices == (torch.device("cuda", 0),)


def test_single_where_several_would_do_says_so(seven_b: Skeleton) -> None:
    with pytest.raises(ConfigurationError, match="device_map: auto spreads it over the 2 GPUs"):
        place(seven_b, gpus(8, 8), "single")


def test_tied_tables_stay_together(checkpoint: Path) -> None:
    """One tensor would otherwise have to be held twice."""
    vision = vision_skeleton(open_checkpoint(checkpoint, precision="W16A16"), torch.bfloat16)
    decoder = _decoder()
    decoder.lm_head.weight = decoder.model.embed_tokens.weight
    placement = place(Skeleton(vision, decoder, LAYER_KV_BYTES), gpus(10, 10), "auto")
    assert len(placement.devices) == 2 and placement.head == placement.embedding


def test_four_bit_layers_count_as_such(checkpoint: Path) -> None:
    """A quarter of 16 bits, and 3 bytes for each group's scale and zero point."""
    sizes = []
    for precision in ("W16A16", "W4A16"):
        opened = open_checkpoint(checkpoint, precision=precision)
        layers = decoder_skeleton(opened, torch.bfloat16).model.layers
        sizes.append(sum(tensor.nbytes for tensor in (*layers.parameters(), *layers.buffers())))
    wide, narrow = sizes
    assert narrow == pytest.approx(wide * (0.25 + 3 / 2 / 128), rel=0.01)


def test_an_unknown_map_and_a_map_for_what_is_no_set_of_gpus_are_refused(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    for device, device_map, message in (
        ("cpu", "spread", "device_map is 'spread'; it must be one of"),
        ("cpu", "balanced", "device is cpu; use device: cuda, or device_map: auto"),
        ("cuda:1", "balanced", "device is cuda:1; use device: cuda"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            choose_placement(
                opened, torch.device(device), torch.bfloat16,
                device_map,  # type: ignore[arg-type]
                EngineOptions(),
            )  # fmt: skip


def answers(checkpoint: Path, **options: Any) -> tuple[list[str], str]:
    """Of a greedy question with a picture and one without, and where they were computed."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    params = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
    with load_engine(checkpoint, dtype="float32", kv_cache_bytes=64 << 20, **options) as engine:
        texts = [
            "".join(delta.text for delta in engine.generate(prompt, pictures, params))
            for prompt, pictures in (("<image>\nWhat is this?", [picture]), ("Where?", []))
        ]
        return texts, engine.description()["device"]


@pytest.mark.parametrize("precision", ["W16A16", "W4A16"])
def test_an_engine_over_two_devices_answers_as_over_one(
    checkpoint: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU under its other name stands for the second."""
    alone, _ = answers(checkpoint, precision=precision, device="cpu", num_threads=1)
    first, second = torch.device("cpu"), torch.device("cpu", 0)
    split = Placement(first, first, (first, second), second, second)
    monkeypatch.setattr(loading, "choose_placement", lambda *_: split)
    got, device = answers(checkpoint, precision=precision, device="cpu", num_threads=1)
    assert got == alone and got[0] != got[1]
    assert device == "cpu: cpu (1 layers), cpu:0: cpu (1 layers)"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["W16A16", "W4A16"])
def test_a_model_on_two_gpus_answers_as_on_one(checkpoint: Path, precision: str) -> None:
    alone, _ = answers(checkpoint, precision=precision, device="cuda", device_map="single")
    got, device = answers(checkpoint, precision=precision, device="cuda", device_map="balanced")
    assert got == alone
    assert "cuda:0" in device and "cuda:1" in device


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kv_cache_of_two_gpus_is_sized_by_what_both_have_left(checkpoint: Path) -> None:
    with load_engine(checkpoint, device="cuda", device_map="balanced", max_num_seqs=4) as engine:
        assert engine.stats().blocks_total == 4 * 1024 // 16, "four full contexts fit"
