"""How large the engine becomes, and what of it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from models import load_engine
from models.engine import sizing
from models.engine.options import EngineOptions
from models.engine.sampler import Sampler
from models.engine.sizing import EngineSizes, keeps_bf16_copy, resolve_sizes, threads_for
from models.errors import ConfigurationError
from models.language.attention import AttentionBatch
from models.language.kv_cache import KVCache, KVCacheShape
from models.loading import load_core
from models.placement import Placement
from tests.tiny import write_tiny_llava

CPU = torch.device("cpu")
ON_CPU = Placement.single(CPU, 3)
CONFIG = LlamaConfig(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, vocab_size=100,
)  # fmt: skip


def shape(block_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> KVCacheShape:
    return KVCacheShape.of(CONFIG, block_size, dtype)


def sizes(context: int = 512, **options: Any) -> EngineSizes:
    resolved = EngineOptions(**options)
    nothing: Any = None  # the decoder and the tower are looked at on a GPU only
    return resolve_sizes(
        resolved, shape(resolved.block_size), context, nothing, nothing, ON_CPU, nothing, nothing
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 16])
def test_a_blocks_bytes_are_counted_right(dtype: torch.dtype, block_size: int) -> None:
    cache = KVCache(shape(block_size, dtype), 5, CPU)
    assert (
        sum(x.nbytes for x in (*cache.keys, *cache.values))
        == 5 * shape(block_size, dtype).bytes_per_block
    )


def test_kv_cache_bytes_are_not_exceeded() -> None:
    per_block = shape().bytes_per_block
    for blocks in (2, 7, 1000):
        assert sizes(kv_cache_bytes=blocks * per_block).num_blocks == blocks
        assert sizes(kv_cache_bytes=blocks * per_block + per_block - 1).num_blocks == blocks


def test_a_request_that_is_alone_can_always_finish() -> None:
    got = sizes(kv_cache_bytes=5 * shape().bytes_per_block, context=512)
    assert got.max_model_len == 5 * 16


def test_without_a_budget_full_contexts_are_held_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sizes(max_num_seqs=3, context=500).num_blocks == 3 * 32
    assert sizes(context=512).num_blocks == 8 * 32, "eight requests on a CPU"
    monkeypatch.setattr(sizing, "available_memory", lambda: 40 * shape().bytes_per_block)
    assert sizes(context=512).num_blocks == 10, "a quarter of the free memory"


def test_steps_have_a_cpus_size_by_default() -> None:
    got = sizes()
    assert (got.max_num_seqs, got.max_num_batched_tokens, got.max_model_len) == (8, 512, 512)
    got = sizes(max_num_seqs=3, max_num_batched_tokens=7)
    assert (got.max_num_seqs, got.max_num_batched_tokens) == (3, 7)


def test_a_cache_without_room_says_how_much_is_needed() -> None:
    with pytest.raises(
        ConfigurationError, match=r"room for 1 blocks of 16 tokens \(\d+ bytes each"
    ):
        sizes(kv_cache_bytes=shape().bytes_per_block)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 0}, {"max_num_seqs": -1}, {"max_num_batched_tokens": 0},
        {"block_size": 0}, {"gpu_memory_utilization": 0.0}, {"kv_cache_bytes": -5},
        {"image_cache_bytes": -1},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_must_be_positive(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"^{name} is .*; it must be positive"):
        EngineOptions(**options)


def test_what_may_be_nothing() -> None:
    options = EngineOptions(image_cache_bytes=0, enable_prefix_caching=False)
    assert options.image_cache_bytes == 0 and options.max_num_seqs is None


def test_the_free_memory_of_this_machine_is_found() -> None:
    assert sizing.available_memory() > 1 << 20


def test_max_model_len_shortens_the_context_and_never_lengthens_it(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", context_length=256)
    for asked, got in ((100, 100), (None, 256), (5000, 256)):
        with load_engine(
            folder, precision="W16A16", device="cpu", max_model_len=asked, num_threads=1
        ) as engine:
            assert engine.context_length == got
            assert engine.description()["context"] == f"{got} tokens"


def test_small_layers_are_not_shared_out_among_threads() -> None:
    seven_b = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    assert threads_for(CONFIG, available=16) == 1
    assert threads_for(seven_b, available=16) == 16


def test_a_16_bit_copy_of_the_weights_is_kept_where_it_takes_a_quarter_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # q, k, v, o and three of the MLP's, in three layers, two bytes each
    copy_bytes = 2 * 3 * (128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 128 * 64)
    for free, kept in ((4 * copy_bytes, True), (4 * copy_bytes - 1, False)):
        monkeypatch.setattr(sizing, "available_memory", lambda free=free: free)
        assert keeps_bf16_copy(EngineOptions(), CONFIG) is kept
        assert keeps_bf16_copy(EngineOptions(bf16_copy=True), CONFIG)
        assert not keeps_bf16_copy(EngineOptions(bf16_copy=False), CONFIG)


class Gpu:
    """torch.cuda's bookkeeping of one GPU of 1,000 blocks, of which others have a hundred."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, weights: int, activations: int) -> None:
        block = shape().bytes_per_block
        total, others = 1000 * block, 100 * block
        fakes = {
            "memory_allocated": weights * block,
            "max_memory_allocated": (weights + activations) * block,
            "mem_get_info": (total - others - weights * block, total),
            "reset_peak_memory_stats": None,
            "empty_cache": None,
        }
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_a_gpus_cache_is_what_utilization_leaves_beside_weights_and_the_largest_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpu(monkeypatch, weights=300, activations=120)
    on_gpu = Placement.single(torch.device("cuda", 0), 3)
    profiled = []
    blocks = sizing._gpu_blocks(
        EngineOptions(gpu_memory_utilization=0.9), shape(), on_gpu, lambda: profiled.append(True)
    )
    assert blocks == 900 - 100 - 300 - 120
    assert profiled == [True]


@pytest.mark.parametrize("context", [40, 300])
def test_the_largest_step_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    """All tokens, pictures and rows, whether or not one request could have as many."""
    folder = write_tiny_llava(tmp_path / "tiny", context_length=context)
    loaded = load_core(folder, precision="W16A16", device="cpu", num_threads=1)
    runner = loaded.core.runner
    vision = runner.images._encode
    seen: dict[str, int] = {}
    decode, sample = runner.decoder.forward, Sampler.sample

    def decoded(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen["tokens"] = len(x)
        return decode(x, *rest)

    def sampled(self: Sampler, logits: torch.Tensor, seqs: Any) -> Any:
        seen["rows"] = len(logits)
        return sample(self, logits, seqs)

    monkeypatch.setattr(runner.decoder, "forward", decoded)
    monkeypatch.setattr(Sampler, "sample", sampled)
    monkeypatch.setattr(vision, "profile", lambda num_images: seen.update(pictures=num_images))
    sizing._profile(
        100, context, 7, runner.cache.shape, runner.decoder, vision, Placement.single(CPU, 2),
        loaded.tokenizer, AttentionBatch,
    )  # fmt: skip
    per_tile = vision.num_tokens_per_tile  # type: ignore[attr-defined]
    assert seen == {"tokens": 100, "rows": 7, "pictures": -(-100 // per_tile)}
