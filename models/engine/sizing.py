"""How much fits: requests at a time, tokens in a step, blocks in the KV cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig

from models.engine.messages import GenerationRequest
from models.engine.options import EngineOptions
from models.engine.output_text import Decodes
from models.engine.prompt_scores import ROWS_AT_A_TIME, scores_of
from models.engine.sampler import Sampler
from models.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from models.engine.sequence import Sequence
from models.errors import ConfigurationError
from models.language.attention import Span
from models.language.attention_backends import StepLayout
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache, KVCacheShape, head_dim
from models.language.loading import linear_shapes
from models.placement import Placement
from models.vision import VisionEncoder

CPU_MEMORY_SHARE = 0.25
"""Of the memory that is free at start, for the KV cache; and as much for a copy of the weights. The
rest is the weights themselves, their page cache, and other people's."""

GPU_STEP_TOKENS, CPU_STEP_TOKENS = 2048, 512

COSTLIEST = SamplingParams(
    temperature=1.0, top_p=0.5, top_k=10, min_p=0.1, logprobs=1, logit_bias={0: 1.0},
    presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1,
)  # fmt: skip
"""Everything that takes memory in sampling."""

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
    placement: Placement,
    tokenizer: Decodes,
    attention: type[StepLayout],
) -> EngineSizes:
    """
    Args:
        context_length: what the model and the options allow, in tokens.
        placement: of the model's parts.

    Raises:
        ConfigurationError: the KV cache could not hold a single block's worth of context.
    """
    on_gpu = placement.embedding.type == "cuda"
    max_num_seqs = options.max_num_seqs or (64 if on_gpu else 8)
    max_num_batched_tokens = options.max_num_batched_tokens or (
        GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS
    )
    blocks_per_seq = -(-context_length // shape.block_size)
    if on_gpu:  # whatever was asked for: it compiles what a first request would wait for
        profile = partial(
            _profile, max_num_batched_tokens, context_length, max_num_seqs, shape, decoder, vision,
            placement, tokenizer, attention,
        )  # fmt: skip
        num_blocks = _gpu_blocks(options, shape, placement, profile)
    else:
        num_blocks = int(available_memory() * CPU_MEMORY_SHARE) // shape.bytes_per_block
    num_blocks = min(num_blocks, max_num_seqs * blocks_per_seq)
    if options.kv_cache_bytes is not None:
        num_blocks = options.kv_cache_bytes // shape.bytes_per_block
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


def keeps_bf16_copy(options: EngineOptions, config: PreTrainedConfig) -> bool:
    """Whether a CPU keeps a 16-bit copy of the 4-bit weights; see `EngineOptions.bf16_copy`."""
    if options.bf16_copy is not None:
        return options.bf16_copy
    copy_bytes = 2 * sum(n * k for n, k in linear_shapes(config).values())
    return copy_bytes <= CPU_MEMORY_SHARE * available_memory()


def threads_for(config: PreTrainedConfig, available: int) -> int:
    """As many threads as have something to do. In small layers they would wait for one another
    most of the time, and for whatever else runs on their cores."""
    attention = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    weights = config.hidden_size * (attention * head_dim(config) + 3 * config.intermediate_size)
    return min(available, max(1, weights // WEIGHTS_PER_THREAD))


def _gpu_blocks(
    options: EngineOptions,
    shape: KVCacheShape,
    placement: Placement,
    profile: Callable[[], None],
) -> int:
    """As many as `gpu_memory_utilization` leaves room for beside the weights and the largest step,
    on the GPU where that is least for its layers.

    Args:
        profile: computes the largest step.
    """
    for device in placement.devices:
        torch.cuda.reset_peak_memory_stats(device)
    before = {device: torch.cuda.memory_allocated(device) for device in placement.devices}
    profile()
    activations = {
        device: torch.cuda.max_memory_allocated(device) - bytes_before
        for device, bytes_before in before.items()
    }
    torch.cuda.empty_cache()
    return min(
        (gpu_budget(device, options.gpu_memory_utilization) - activations[device])
        // (num_layers * shape.layer_bytes_per_block)
        for device, num_layers in Counter(placement.layers).items()
    )


@torch.inference_mode()
def _profile(
    num_tokens: int,
    context_length: int,
    num_rows: int,
    shape: KVCacheShape,
    decoder: Decoder,
    vision: VisionEncoder,
    placement: Placement,
    tokenizer: Decodes,
    attention: type[StepLayout],
) -> None:
    """The largest step: all its tokens are of prompts as long as can be, as many pictures as they
    can hold are new, and `num_rows` are sampled, with everything that a request may ask for."""
    lengths = [
        min(context_length, num_tokens - start) for start in range(0, num_tokens, context_length)
    ]
    longest = -(-max(lengths) // shape.block_size)
    cache = KVCache(shape, longest * len(lengths), placement.layers)
    spans = [
        Span(0, length, range(index * longest, (index + 1) * longest))
        for index, length in enumerate(sorted(lengths))
    ]
    layout = attention.build(spans, shape, placement.embedding)
    token_ids = torch.zeros(num_tokens, dtype=torch.long, device=placement.embedding)
    embeddings = decoder.embed(token_ids)
    vision.profile(num_images=-(-num_tokens // vision.num_tokens_per_tile))
    hidden = decoder(embeddings, cache, layout)
    prompt = hidden[:ROWS_AT_A_TIME]
    scores_of(decoder.logits(prompt), [0] * len(prompt), MAX_LOGPROBS)
    rows = torch.arange(num_rows, device=hidden.device) % num_tokens
    request = GenerationRequest("profile", [0], (), COSTLIEST)
    seq = Sequence(request, tokenizer, shape.block_size, context_length)
    Sampler().sample(decoder.logits(hidden[rows]), [seq] * num_rows).fetch()


def gpu_budget(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU that this process may still take."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free)


def available_memory() -> int:
    """Bytes that this process may still take, by the kernel and by its control group."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else 0
    return available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
