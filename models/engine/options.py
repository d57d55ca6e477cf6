"""How large the engine is. The names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from models.errors import ConfigurationError


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine; `None` means "decide from the device and the model".

    Attributes:
        max_model_len: longest prompt plus answer, in tokens; default: the model's context.
        max_num_seqs: how many requests run at a time; default 64 on a GPU, 8 on a CPU.
        max_num_batched_tokens: tokens computed in one step at most, decodes included: the size of
            a prefill chunk; default 2,048 on a GPU, 512 on a CPU.
        max_prefill_slowdown: by what share arriving prompts may raise the running streams' time per
            token, on average. The smaller, the longer new requests wait for their first token;
            None: without limit.
        async_scheduling: hand a step to the device before the tokens of the one before it have come
            back, so that the device never waits; default: on a GPU. A CPU computes in the same
            place anyway.
        enforce_eager: on a GPU: capture no CUDA graphs of decode steps. They take some seconds at
            start and some memory.
        attention_backend: a name of `models.language.attention_backends`; auto: the fastest.
        block_size: tokens in a KV block.
        bf16_copy: on a CPU without AVX-512's bf16 instructions, or without a C++ compiler: keep a
            16-bit copy of 4-bit weights besides, with which prompts are computed up to 2.5 times
            as fast; default: where a quarter of the free memory holds it. Elsewhere our own
            kernel computes them, and needs none.
        gpu_memory_utilization: share of each GPU's memory for weights, activations and KV cache.
        kv_cache_bytes: size of the KV cache; default on a GPU: what `gpu_memory_utilization`
            leaves; on a CPU: `max_num_seqs` full contexts, at most a quarter of the free memory.
        enable_prefix_caching: share the KV blocks of equal beginnings, pictures included.
        image_cache_bytes: how many bytes of projected picture embeddings are kept for reuse.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_prefill_slowdown: float | None = 0.45
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    attention_backend: str = "auto"
    block_size: int = 16
    bf16_copy: bool | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    image_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            least = 0 if field.name == "image_cache_bytes" or isinstance(value, bool) else 1e-9
            if value is not None and value < least:
                raise ConfigurationError(f"{field.name} is {value!r}; it must be positive")
        if self.gpu_memory_utilization > 1:
            raise ConfigurationError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; "
                "it is a share of the GPU's memory and must be at most 1"
            )
