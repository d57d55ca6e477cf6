"""The decoder computes what transformers' LlamaForCausalLM computes, however it is batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
        found = {name: tuple(t.shape) for name, t in self.tensors.items()}
        assert found == expected, set(found.items()) ^ set(expected.items())


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def pair(rope: str = "default", **overrides: Any) -> tuple[LlamaForCausalLM, Decoder]:
    torch.manual_seed(1)
    options: dict[str, Any] = {
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
        layout = AttentionBatch.build(spans, cache.shape, CPU)
        return decoder.logits(decoder(decoder.embed(ids), cache, layout))


@pytest.mark.parametrize(
    ("rope", "overrides"),
    [
        ("default", {}),
        ("linear", {}),
        ("llama3", {}),
        ("dynamic", {}),
        ("yarn", {}),
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


@settings(max_examples=15)
@given(st.data())
def test_random_chunks_of_random_companies_give_the_same_logits(data: st.DataObject) -> None:
    """Chunks of any size, decodes among them, blocks in any order: each token's own logits."""
    reference, decoder = pair()
    count = data.draw(st.integers(1, 4), "sequences")
    lengths = [data.draw(st.integers(1, 30), "length") for _ in range(count)]
    blocks = data.draw(st.permutations(range(16)), "blocks")
    tables = [blocks[4 * i : 4 * i + 4] for i in range(count)]
    sequences = [torch.randint(0, 120, (length,)).tolist() for length in lengths]
    with torch.inference_mode():
        expected = [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]
    cache = KVCache(KVCacheShape.of(reference.config, BLOCK, torch.float32), 16, CPU)
    done = [0] * count
    while any(done[i] < lengths[i] for i in range(count)):
        left = [length - end for length, end in zip(lengths, done, strict=True)]
        sizes = [n - data.draw(st.integers(0, n), "kept for later") for n in left]
        work = [
            (sequences[i], done[i], done[i] + size, tables[i])
            for i, size in enumerate(sizes) if size
        ]  # fmt: skip
        if not work:
            continue
        got = compute(decoder, cache, work)
        row = 0
        for tokens, start, end, _ in sorted(work, key=lambda w: w[2] - w[1] > 1):
            index = next(i for i, other in enumerate(sequences) if other is tokens)
            error = (got[row : row + end - start] - expected[index][start:end]).abs().max()
            assert error < 1e-4
            row += end - start
            done[index] = end


def test_a_sequence_never_reads_anothers_blocks() -> None:
    """What lies in blocks that are not its own, or behind its end in its last one."""
    reference, decoder = pair()
    tokens = torch.randint(0, 120, (20,)).tolist()
    shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
    outputs = []
    for filling in (0.0, 1e6):
        cache = KVCache(shape, 8, CPU)
        cache.keys.fill_(filling)
        cache.values.fill_(filling)
        compute(decoder, cache, [(tokens, 0, 19, [4, 1, 6])])
        outputs.append(compute(decoder, cache, [(tokens, 19, 20, [4, 1, 6])]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.extra.weight": torch.zeros(2)}, "model.extra.weight"),
        ({"lm_head.weight": torch.zeros(120, 63)}, "lm_head.weight"),
    ],
)
def test_the_expected_tensors_are_asked_for_by_the_checkpoints_names(
    change: dict[str, Tensor | None], message: str
) -> None:
    reference, _ = pair()
    tensors: dict[str, Tensor | None] = {**reference.state_dict(), **change}
    source = MemorySource({name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(AssertionError, match=message):
        load_decoder(
            source,  # type: ignore[arg-type]
            reference.config, max_positions=128, device=CPU, dtype=torch.float32,
            backend="reference",
        )  # fmt: skip
