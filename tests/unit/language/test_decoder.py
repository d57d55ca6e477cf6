"""The decoder computes what transformers' LlamaForCausalLM computes, however it is batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models.language.attention import AttentionBatch, Span
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.loading import load_decoder

CPU = torch.device("cpu")
BLOCK = 8


class MemorySource:
    """Tensors of a 16-bit checkpoint, without files."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def is_quantized(self, linear: str) -> bool:
        return False

    def check(self, expected: dict[str, tuple[int, ...]], quantized: object) -> None:
        assert {name: tuple(t.shape) for name, t in self.tensors.items()} == expected


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def pair(rope: str = "default", **overrides: object) -> tuple[LlamaForCausalLM, Decoder]:
    torch.manual_seed(1)
    options: dict[str, object] = {
        "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "rope_parameters": ROPES[rope],
    }  # fmt: skip
    config = LlamaConfig(**{**options, **overrides})
    reference = LlamaForCausalLM(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = dict(reference.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    decoder = load_decoder(
        MemorySource(tensors),  # type: ignore[arg-type]
        config, max_positions=128, device=CPU, dtype=torch.float32, backend="reference",
    )  # fmt: skip
    return reference, decoder


def compute(
    decoder: Decoder, cache: KVCache, work: list[tuple[list[int], int, int, list[int]]]
) -> Tensor:
    """Logits of all tokens of (token_ids, start, end, block_table) chunks, single tokens first."""
    work = sorted(work, key=lambda w: w[2] - w[1] > 1)
    spans = [Span(start, end, table) for _, start, end, table in work]
    ids = torch.tensor([t for tokens, start, end, _ in work for t in tokens[start:end]])
    with torch.inference_mode():
        layout = AttentionBatch.build(spans, BLOCK, CPU)
        return decoder.logits(decoder(decoder.embed(ids), cache, layout))


@pytest.mark.parametrize(
    ("rope", "overrides"),
    [
        ("default", {}),
        ("linear", {}),
        ("llama3", {}),
        ("default", {"num_key_value_heads": 4}),
        ("default", {"num_key_value_heads": 1}),
        ("default", {"head_dim": 32}),
        ("default", {"attention_bias": True, "mlp_bias": True}),
        ("default", {"tie_word_embeddings": True}),
    ],
)
def test_logits_equal_transformers(rope: str, overrides: dict[str, object]) -> None:
    reference, decoder = pair(rope, **overrides)
    tokens = torch.randint(0, 120, (50,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    cache = KVCache(KVCacheShape.of(reference.config, BLOCK, torch.float32), 8, CPU)
    got = compute(decoder, cache, [(tokens, 0, 50, [5, 1, 7, 0, 3, 2, 6])])
    assert (got - expected).abs().max() < 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_any_chunking_in_any_company_gives_the_same_logits() -> None:
    reference, decoder = pair()
    first, second = (torch.randint(0, 120, (n,)).tolist() for n in (40, 33))
    cache = KVCache(KVCacheShape.of(reference.config, BLOCK, torch.float32), 16, CPU)
    a, b = [9, 3, 0, 7, 2], [1, 8, 4, 5, 11]
    with torch.inference_mode():
        expected = [reference(torch.tensor([t])).logits[0] for t in (first, second)]
    compute(decoder, cache, [(first, 0, 13, a), (second, 0, 20, b)])
    compute(decoder, cache, [(first, 13, 38, a), (second, 20, 21, b)])
    last = compute(decoder, cache, [(first, 38, 39, a), (second, 21, 33, b)])
    assert (last[0] - expected[0][38]).abs().max() < 1e-4
    assert (last[1:] - expected[1][21:33]).abs().max() < 1e-4
    last = compute(decoder, cache, [(first, 39, 40, a), (second, 32, 33, b)])
    assert (last - torch.stack([expected[0][39], expected[1][32]])).abs().max() < 1e-4
