"""The whole decoder by the GPU's kernels, against transformers' models on the CPU in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.gpu.support import runs_triton
from models.language import fused
from models.language.attention import Span
from models.language.attention_backends import ATTENTION_BACKENDS, select_attention
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.paged_batch import PagedBatch
from tests.unit.gpu.device import DEVICE, needs_gpu
from tests.unit.language.test_decoder import pair

BLOCK = 16


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "runs_triton", lambda device: True)


def compute(decoder: Decoder, cache: KVCache, ids: list[int], batch: PagedBatch) -> Tensor:
    with torch.inference_mode():
        hidden = decoder(decoder.embed(torch.tensor(ids, device=DEVICE)), cache, batch)
        return decoder.logits(hidden).cpu()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("mistral", {"num_key_value_heads": 1, "head_dim": 32}),
        ("qwen2", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}),
    ],
)
def test_prompts_and_decodes_give_transformers_logits(
    family: str, overrides: dict[str, object]
) -> None:
    """Two prompts in two chunks each, then a step of a captured graph's shape."""
    reference, decoder = pair(family=family, device=DEVICE, num_hidden_layers=2, **overrides)
    first, second = (torch.randint(0, 120, (n,)).tolist() for n in (31, 15))
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids])).logits[0] for ids in (first, second)]
    shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
    cache = KVCache(shape, 8, DEVICE)
    a, b = [6, 1], [3]

    chunk = PagedBatch.build([Span(0, 1, b), Span(0, 20, a)], shape, DEVICE)
    got = compute(decoder, cache, second[:1] + first[:20], chunk)
    assert (got - torch.cat([expected[1][:1], expected[0][:20]])).abs().max() < 1e-4
    chunk = PagedBatch.build([Span(20, 30, a), Span(1, 14, b)], shape, DEVICE)
    got = compute(decoder, cache, first[20:30] + second[1:14], chunk)
    assert (got - torch.cat([expected[0][20:30], expected[1][1:14]])).abs().max() < 1e-4

    padded = PagedBatch.padded(4, 8, shape, DEVICE)
    padded.load([Span(30, 31, a), Span(14, 15, b)], shape)
    got = compute(decoder, cache, [first[30], second[14], 0, 0], padded)
    assert (got[0] - expected[0][30]).abs().max() < 1e-4
    assert (got[1] - expected[1][14]).abs().max() < 1e-4
    assert got.isfinite().all(), "padding too"


@needs_gpu
def test_a_captured_graph_goes_on_giving_transformers_logits() -> None:
    """One capture, before there is any sequence; then steps as a prompt grows over its blocks."""
    reference, decoder = pair(device=DEVICE)
    ids = torch.randint(0, 120, (60,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    shape = KVCacheShape.of(reference.config, BLOCK, torch.float32)
    cache = KVCache(shape, 8, DEVICE)
    with torch.inference_mode():
        batch = PagedBatch.padded(2, 8, shape, DEVICE, more={"token_ids": (2,)})

        def step() -> Tensor:
            x = decoder.embed(batch.integers["token_ids"])
            return decoder.logits(decoder(x, cache, batch))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        for position, token in enumerate(ids):
            span = Span(position, position + 1, [5, 0, 3, 6])
            more = {"token_ids": torch.tensor([token, 0], dtype=torch.int32).numpy()}
            batch.load([span], shape, more)
            graph.replay()
            assert (logits[0].cpu() - expected[position]).abs().max() < 1e-4


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_answer_as_torchs_operators_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, decoder = pair(device=DEVICE)
    decoder = decoder.to(dtype)
    ids = torch.randint(0, 120, (50,)).tolist()
    shape = KVCacheShape.of(reference.config, BLOCK, dtype)
    spans, results = [Span(0, 50, [4, 1, 6, 2])], []
    for name in ("triton", "torch"):
        monkeypatch.setattr(fused, "runs_triton", lambda device, on=name == "triton": on)
        batch = ATTENTION_BACKENDS[name].build(spans, shape, DEVICE)
        results.append(compute(decoder, KVCache(shape, 8, DEVICE), ids, batch))  # type: ignore[arg-type]
    scale = results[1].abs().max()
    assert (results[0] - results[1]).abs().max() < scale * (
        0.01 if dtype == torch.float16 else 0.05
    )


@needs_gpu
def test_the_kernels_are_what_a_gpu_gets() -> None:
    assert runs_triton(DEVICE) and ATTENTION_BACKENDS[select_attention(DEVICE)] is PagedBatch
