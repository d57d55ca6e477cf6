"""How much fits: requests at a time, tokens in a step, blocks in the KV cache."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from models.engine.options import EngineOptions
from models.errors import ConfigurationError
from models.language.attention import AttentionBatch, Span
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache, KVCacheShape, head_dim
from models.vision import VisionEncoder

CPU_MEMORY_SHARE = 0.25
"""Of the memory that is free at start; the rest is the weights' page cache and other people's."""

WEIGHTS_PER_THREAD = 2 << 20
"""Of one decoder layer. With fewer, one thread was faster than two."""


@dataclass(frozen=True)
class EngineSizes:
    """`EngineOptions` with every "decide for me" decided."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int


def resolve_sizes(
    options: EngineOptions,
    shape: KVCacheShape,
    context_length: int,
    decoder: Decoder,
    vision: VisionEncoder,
    device: torch.device,
) -> EngineSizes:
    """
    Args:
        context_length: what the model and the options allow, in tokens.

    Raises:
        ConfigurationError: the KV cache could not hold a single block's worth of context.
    """
    on_gpu = device.type == "cuda"
    max_num_seqs = options.max_num_seqs or (64 if on_gpu else 8)
    max_num_batched_tokens = options.max_num_batched_tokens or (2048 if on_gpu else 512)
    blocks_per_seq = -(-context_length // shape.block_size)
    if options.kv_cache_bytes is not None:
        budget = options.kv_cache_bytes
    elif on_gpu:
        budget = _gpu_budget(options, shape, max_num_batched_tokens, decoder, vision, device)
    else:
        budget = int(_available_memory() * CPU_MEMORY_SHARE)
    num_blocks = budget // shape.bytes_per_block
    if options.kv_cache_bytes is None:
        num_blocks = min(num_blocks, max_num_seqs * blocks_per_seq)
    if num_blocks < 2:
        raise ConfigurationError(
            f"the KV cache has room for {num_blocks} blocks of {shape.block_size} tokens "
            f"({shape.bytes_per_block} bytes each); raise kv_cache_bytes or "
            "gpu_memory_utilization, or use a smaller model"
        )
    return EngineSizes(
        # A request that is alone must always be able to finish.
        max_model_len=min(context_length, num_blocks * shape.block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
    )


def threads_for(config: PreTrainedConfig, available: int) -> int:
    """As many threads as have something to do. In small layers they would wait for one another
    most of the time, and for whatever else runs on their cores."""
    attention = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    weights = config.hidden_size * (attention * head_dim(config) + 3 * config.intermediate_size)
    return min(available, max(1, weights // WEIGHTS_PER_THREAD))


@torch.inference_mode()
def _gpu_budget(
    options: EngineOptions,
    shape: KVCacheShape,
    num_tokens: int,
    decoder: Decoder,
    vision: VisionEncoder,
    device: torch.device,
) -> int:
    """Bytes that `gpu_memory_utilization` leaves beside the weights and the largest step."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    num_blocks = -(-num_tokens // shape.block_size)
    scratch = KVCache(shape, num_blocks, device)
    spans = [Span(0, num_tokens, range(num_blocks))]
    layout = AttentionBatch.build(spans, shape, device)
    embeddings = decoder.embed(torch.zeros(num_tokens, dtype=torch.long, device=device))
    decoder.logits(decoder(embeddings, scratch, layout)[-1:])
    vision.profile(num_images=-(-num_tokens // vision.num_tokens_per_tile))
    activations = torch.cuda.max_memory_allocated(device) - before
    del scratch, embeddings, layout
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved_by_others = total - free
    return int(total * options.gpu_memory_utilization) - reserved_by_others - activations


def _available_memory() -> int:
    """Bytes that this process may still take, by the kernel and by its control group."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else 0
    return available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
