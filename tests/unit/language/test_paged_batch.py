"""What the GPU's kernels are told about a step, token by token; and which device is told it."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigurationError
from models.gpu.integers import Integers
from models.language.attention import AttentionBatch, Span
from models.language.attention_backends import ATTENTION_BACKENDS, select_attention
from models.language.kv_cache import KVCacheShape
from models.language.paged_batch import PagedBatch

CPU = torch.device("cpu")
SHAPE = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=16, block_size=16, dtype=torch.float32)


@given(
    st.lists(st.integers(0, 100), max_size=5),
    st.lists(st.tuples(st.integers(0, 70), st.integers(2, 60)), max_size=3),
    st.randoms(use_true_random=False),
)
def test_each_tokens_position_slot_and_sequence(decodes, chunks, random) -> None:  # type: ignore[no-untyped-def]
    ranges = [(start, start + 1) for start in decodes] + [(s, s + n) for s, n in chunks]
    spans = [Span(s, e, array("q", random.sample(range(50), -(-e // 16) + 1))) for s, e in ranges]
    batch = PagedBatch.build(spans, SHAPE, CPU)
    tokens = [(span, position) for span in spans for position in range(span.start, span.end)]
    assert batch.positions.tolist() == [position for _, position in tokens]
    assert batch.integers["slots"].tolist() == [
        span.block_table[position // 16] * 16 + position % 16 for span, position in tokens
    ]
    assert batch.integers["lengths"].tolist() == [end for _, end in ranges]
    for span, row in zip(spans, batch.tables.tolist(), strict=True):
        used = -(-span.end // 16)
        assert row[:used] == list(span.block_table[:used]) and not any(row[used:])
    ends = np.cumsum([len(decodes), *(n for _, n in chunks)])
    assert batch.integers["row_starts"].tolist() == ends.tolist()
    assert batch.num_decodes == len(decodes)
    assert batch.max_rows == max((n for _, n in chunks), default=0)


def test_a_step_brings_other_integers_along_in_the_same_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *args, **kwargs: copies.append(args) or copy(*args, **kwargs)
    )
    ids = np.array([7, 8, 9], np.int32)
    batch = PagedBatch.build([Span(0, 3, [2])], SHAPE, CPU, {"token_ids": ids})
    assert batch.integers["token_ids"].tolist() == [7, 8, 9]
    assert len(copies) == 1


def test_integers_lie_where_kernels_are_compiled_for() -> None:
    """Multiples of 16 bytes from the buffer's beginning, and they stay there."""
    shapes = {"a": (3,), "b": (2, 5), "none": (0,), "c": (1,)}
    integers = Integers(shapes, CPU)
    first = integers["a"].data_ptr()
    assert all((integers[name].data_ptr() - first) % 16 == 0 for name in ("b", "c"))
    before = integers["b"]
    for value in (1, 2):
        integers.load({name: np.full(shape, value, np.int32) for name, shape in shapes.items()})
        assert {name: tuple(integers[name].shape) for name in shapes} == shapes
        assert (before == value).all() and (integers["c"] == value).all()
    moved = integers.to(torch.device("cpu", 0))
    assert torch.equal(moved["b"], before)


def test_more_than_there_is_room_for_is_an_error_and_no_overrun() -> None:
    batch = PagedBatch.padded(2, 2, SHAPE, CPU)
    for spans in (
        [Span(0, 1, [1]), Span(0, 1, [2]), Span(0, 1, [3])],  # sequences
        [Span(32, 33, [1, 2, 3])],  # blocks
        [Span(0, 2, [1])],  # tokens
    ):
        with pytest.raises((ValueError, IndexError)):
            batch.load(spans, SHAPE)
    assert not batch.integers["lengths"].any() and (batch.integers["slots"] == -1).all()


def test_a_cpu_computes_with_torch_and_is_refused_tritons_kernels() -> None:
    assert ATTENTION_BACKENDS[select_attention(CPU)] is AttentionBatch
    with pytest.raises(ConfigurationError, match="'triton' does not run on cpu"):
        select_attention(CPU, "triton")
    with pytest.raises(ConfigurationError, match=r"unknown attention backend 'x'; known: torch"):
        ATTENTION_BACKENDS[select_attention(CPU, "x")]
