"""What is written at a slot is read in its place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.language.attention import AttentionBatch, Span
from models.language.kv_cache import KVCache, KVCacheShape

CPU = torch.device("cpu")
SHAPE = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=4, block_size=4, dtype=torch.float32)


@given(st.permutations(range(8)), st.integers(1, 32), st.integers(0, 1))
def test_tokens_come_back_in_their_order(blocks: list[int], tokens: int, layer: int) -> None:
    cache = KVCache(SHAPE, 8, CPU)
    keys, values = torch.randn(2, tokens, 3, 4)
    batch = AttentionBatch.build([Span(0, tokens, blocks)], SHAPE, CPU)
    cache.write(layer, batch.slots, keys, values)
    used = SHAPE.tables(torch.tensor(blocks[: -(-tokens // 4)]))
    read_keys, read_values = (x.transpose(0, 1) for x in cache.read(layer, used))
    assert torch.equal(read_keys[:tokens], keys) and torch.equal(read_values[:tokens], values)
    assert not cache.keys[1 - layer].any(), "the other layer's are its own"


def test_several_tables_are_read_at_once() -> None:
    cache = KVCache(SHAPE, 8, CPU)
    cache.keys[0][:] = torch.arange(8.0)[:, None, None, None]
    keys, _ = cache.read(0, SHAPE.tables(torch.tensor([[3, 1], [7, 0]])))
    assert keys.shape == (2, 3, 8, 4)
    assert keys[:, 0, :, 0].tolist() == [[3.0] * 4 + [1.0] * 4, [7.0] * 4 + [0.0] * 4]


def test_masks_end_where_each_sequence_ends() -> None:
    spans = [Span(5, 6, [2, 3]), Span(0, 1, [1]), Span(8, 10, [4, 5, 6])]
    batch = AttentionBatch.build(spans, SHAPE, CPU)
    assert batch.num_decodes == 2 and batch.positions.tolist() == [5, 0, 8, 9]
    first_heads = batch.slots[:, 0].tolist()
    assert first_heads == [3 * 12 + 1, 12, 6 * 12, 6 * 12 + 1]
    assert (batch.slots - batch.slots[:, :1]).tolist() == [[0, 4, 8]] * 4
    assert batch.decode_mask[:, 0, 0].sum(-1).tolist() == [6, 1]
    (chunk,) = batch.prompts
    assert chunk.mask is not None and chunk.mask.sum(-1).tolist() == [9, 10]
    assert (chunk.first, chunk.last, chunk.context) == (2, 4, 8)
