"""A real engine core around a tiny random decoder in fp32, its linears in 4 bits on the reference
backend: seconds for thousands of steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from models.awq import W4A16Linear, quantize_rtn
from models.engine.core import EngineCore
from models.engine.engine import Engine
from models.engine.host import ThreadHost
from models.engine.image_cache import ImageEmbeddingCache
from models.engine.messages import GenerationDelta, GenerationRequest, ImageSpan
from models.engine.runner import ModelRunner
from models.engine.sampling_params import SamplingParams
from models.language.decoder import Decoder, RMSNorm
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.rope import RotaryEmbedding

VOCAB = 96
HIDDEN = 32
EOS = 1
BLOCK = 4
CPU = torch.device("cpu")


class LetterTokenizer:
    """Token n is one character; EOS is nothing."""

    vocab_size = VOCAB

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x20 + i) for i in ids if i != EOS)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else chr(0x20 + token_id).encode()


@dataclass(frozen=True)
class Picture:
    """What the engine needs of a prepared image."""

    digest: bytes
    num_tokens: int


def encode(pictures: Sequence[Picture]) -> list[Tensor]:
    """Stands for tower and projector: embeddings that depend on the content alone."""
    return [
        torch.randn(p.num_tokens, HIDDEN, generator=torch.Generator().manual_seed(p.digest[0]))
        for p in pictures
    ]


@lru_cache(maxsize=1)
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = Decoder(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
            if name != "lm_head":
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, quantized(module))
    model.rotary = RotaryEmbedding(config, 256, CPU)
    return model.eval().requires_grad_(False)


def quantized(linear: torch.nn.Linear) -> W4A16Linear:
    return W4A16Linear.from_quantized(
        quantize_rtn(linear.weight, 32), backend="reference", device=CPU, dtype=torch.float32
    )


def build_core(
    *, blocks: int = 64, seqs: int = 4, budget: int = 16, caching: bool = True,
    max_len: int = 128, image_bytes: int = 1 << 20, slowdown: float | None = None,
    async_scheduling: bool = False,
) -> EngineCore:  # fmt: skip
    shape = KVCacheShape.of(decoder().config, BLOCK, torch.float32)
    images = ImageEmbeddingCache(encode, image_bytes)  # type: ignore[arg-type]
    return EngineCore(
        ModelRunner(decoder(), images, KVCache(shape, blocks, CPU), CPU),
        LetterTokenizer(),
        {EOS},
        max_model_len=min(max_len, blocks * BLOCK),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        max_prefill_slowdown=slowdown,
        async_scheduling=async_scheduling,
    )


def core_of(engine: Engine) -> EngineCore:
    """The core of an engine that runs in this process."""
    assert isinstance(engine._host, ThreadHost)
    return engine._host.loop.core


def request(
    request_id: str,
    tokens: Sequence[int],
    pictures: Sequence[tuple[int, Picture]] = (),
    **params: Any,
) -> GenerationRequest:
    """`pictures`: (where it starts, picture); the tokens there are replaced by placeholders."""
    token_ids = list(tokens)
    spans = []
    for start, picture in pictures:
        token_ids[start : start + picture.num_tokens] = [-200] * picture.num_tokens
        spans.append(ImageSpan(start, picture))  # type: ignore[arg-type]
    params.setdefault("temperature", 0.0)
    params.setdefault("max_new_tokens", 8)
    return GenerationRequest(
        request_id,
        token_ids,
        tuple(spans),
        SamplingParams(**params),
    )


def wait_for_guides(core: EngineCore) -> None:
    wait([seq.guide for seq in core.scheduler.waiting if seq.guide is not None])


def run_all(core: EngineCore, max_steps: int = 2000) -> list[GenerationDelta]:
    """Steps until idle, checking the accounting of every block after each step."""
    wait_for_guides(core)
    deltas: list[GenerationDelta] = []
    for _ in range(max_steps):
        if not core.has_work:
            core.check_idle()
            return deltas
        deltas += core.step()
        core.check_integrity()
    raise AssertionError(f"still busy after {max_steps} steps")


def answers(deltas: Sequence[GenerationDelta]) -> dict[str, list[int]]:
    """All token ids of each request."""
    out: dict[str, list[int]] = {}
    for delta in deltas:
        out.setdefault(delta.request_id, []).extend(delta.token_ids)
    return out


def alone_deltas(req: GenerationRequest) -> list[GenerationDelta]:
    """The request's answer with the engine to itself, uncached, unchunked, never preempted."""
    core = build_core(blocks=64, seqs=1, budget=256, caching=False)
    core.add(req)
    return run_all(core)


def alone(req: GenerationRequest) -> list[int]:
    """Its tokens."""
    return answers(alone_deltas(req))[req.request_id]
