"""The decoder computes what transformers' models of each family compute, however it is batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models.awq import QuantizedWeight
from models.awq.quantize import quantize_rtn
from models.language.attention import AttentionBatch, Span
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.loading import load_decoder
from models.placement import Placement

CPU = torch.device("cpu")
BLOCK = 8


FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


class MemorySource:
    """A checkpoint's tensors, without files."""

    def __init__(
        self, tensors: dict[str, Tensor], layers: dict[str, QuantizedWeight] | None = None
    ) -> None:
        self.tensors = tensors
        self.layers = layers or {}

    def names(self) -> set[str]:
        return set(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def copy_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensors[name])

    def is_quantized(self, linear: str) -> bool:
        return linear in self.layers

    def are_quantized(self, linears: list[str]) -> bool:
        return all(linear in self.layers for linear in linears)

    def quantized(self, linear: str) -> QuantizedWeight:
        return self.layers[linear]

    def check(
        self, expected: dict[str, tuple[int, ...]], quantized: dict[str, tuple[int, int]]
    ) -> None:
        found = {name: tuple(t.shape) for name, t in self.tensors.items()}
        assert found == expected, set(found.items()) ^ set(expected.items())
        assert {name: tuple(layer.q.shape) for name, layer in self.layers.items()} == quantized


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


def pair(
    rope: str = "default",
    family: str = "llama",
    *,
    quantized: bool = False,
    device: torch.device | Placement = CPU,
    **overrides: Any,
) -> tuple[PreTrainedModel, Decoder]:
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "rope_parameters": dict(ROPES[rope]),
    }  # fmt: skip
    config_class, model_class = FAMILIES[family]
    config = config_class(**{**options, **overrides})
    reference = model_class(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = {}
    if quantized:
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                layers[name] = quantize_rtn(module.weight.detach(), group_size=32)
                module.weight.data = layers[name].dequantize(torch.float32)
    tensors = dict(reference.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    source = MemorySource(
        {k: v for k, v in tensors.items() if k.removesuffix(".weight") not in layers}, layers
    )
    decoder = load_decoder(
        source,  # type: ignore[arg-type]
        config, max_positions=128, device=device, dtype=torch.float32, backend="reference",
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


def check_logits(reference: PreTrainedModel, decoder: Decoder) -> None:
    tokens = torch.randint(0, 120, (50,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
    cache = KVCache(shape, 8, decoder.placement.layers)
    got = compute(decoder, cache, [(tokens, 0, 50, [5, 1, 7, 0, 3, 2, 6])])
    assert (got - expected).abs().max() < 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


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
    check_logits(*pair(rope, **overrides))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("mistral", {"num_key_value_heads": 4, "head_dim": 32}),
        ("mistral", {"sliding_window": 50}),  # which the 50 tokens just fill
        ("qwen2", {}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_each_familys_logits_equal_transformers(
    family: str, overrides: dict[str, object], quantized: bool
) -> None:
    """GQA, and biases beside 4-bit weights, included."""
    reference, decoder = pair(family=family, quantized=quantized, **overrides)
    linears = {type(layer.self_attn.qkv_proj).__name__ for layer in decoder.model.layers}
    assert linears == {"W4A16Linear" if quantized else "Linear"}
    check_logits(reference, decoder)


def test_a_family_without_biases_refuses_them_and_one_with_asks_for_them() -> None:
    """Qwen2's on q, k and v have no key in its config; Mistral's config has no key for any."""
    qwen, _ = pair(family="qwen2")
    biases = {name for name in qwen.state_dict() if name.endswith("bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"}
    for family, tensors in (
        ("qwen2", {name: t for name, t in qwen.state_dict().items() if name not in biases}),
        ("mistral", qwen.state_dict()),
    ):
        config = pair(family=family)[0].config
        with pytest.raises(AssertionError, match=r"self_attn\.q_proj\.bias"):
            load_decoder(
                MemorySource(tensors),  # type: ignore[arg-type]
                config, max_positions=128, device=CPU, dtype=torch.float32, backend="reference",
            )  # fmt: skip


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
        for vectors in (*cache.keys, *cache.values):
            vectors.fill_(filling)
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


class OneDevice(TorchDispatchMode):
    """Refuses operators whose tensors lie on several devices; `meta`'s own check only some."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        assert len(devices) < 2 or func is torch.ops.aten.copy_.default, (func, devices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("others", [1, 2])
def test_layers_on_several_devices_give_the_same_logits(
    others: int, tied: bool, quantized: bool
) -> None:
    """The CPU under its other name takes the way of a second device."""
    second = torch.device("cpu", 0)
    placement = Placement(CPU, CPU, (CPU,) * (3 - others) + (second,) * others, second, second)
    overrides = {"quantized": quantized, "tie_word_embeddings": tied}
    reference, decoder = pair(device=placement, **overrides)  # type: ignore[arg-type]
    check_logits(reference, decoder)
    _, alone = pair(**overrides)  # type: ignore[arg-type]
    tokens = torch.randint(0, 120, (20,)).tolist()
    outputs = []
    for model in (decoder, alone):
        shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
        cache = KVCache(shape, 8, model.placement.layers)
        compute(model, cache, [(tokens, 0, 11, [4, 1, 6])])
        outputs.append(compute(model, cache, [(tokens, 11, 20, [4, 1, 6]), (tokens, 0, 1, [3])]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_what_is_computed_with_is_on_its_device(first: int, tied: bool, quantized: bool) -> None:
    """The part `first`, of three layers, norm and head, and those behind it lie on `meta`."""
    meta = torch.device("meta")
    *layers, norm, head = [CPU] * first + [meta] * (5 - first)
    placement = Placement(CPU, CPU, tuple(layers), norm, head)
    reference, decoder = pair(device=placement, quantized=quantized, tie_word_embeddings=tied)
    devices = {
        name: tensor.device.type
        for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers())
    }
    places = [f"model.layers.{index}." for index in range(3)] + ["model.norm.", "lm_head."]
    before = ("model.embed_tokens.", "rotary.", *places[:first])
    assert {name for name, device in devices.items() if device == "cpu"} == {
        name for name in devices if name.startswith(before)
    }
    shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
    cache = KVCache(shape, 8, decoder.placement.layers)
    for vectors in (cache.keys, cache.values):
        assert [part.device for part in vectors] == layers
    tokens = list(range(20))
    with OneDevice():
        compute(decoder, cache, [(tokens, 0, 9, [4, 1, 6])])
        logits = compute(decoder, cache, [(tokens, 9, 20, [4, 1, 6]), (tokens, 5, 6, [3])])
    assert logits.device == meta and logits.shape == (12, 120)
