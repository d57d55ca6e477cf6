"""The layout of a step for the kernels in `models.gpu`, which read the cache where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.gpu.integers import IntArray, Integers
from models.gpu.support import num_multiprocessors
from models.gpu.tiles import split_count
from models.language.attention import Span
from models.language.kv_cache import KVCache, KVCacheShape


@dataclass(frozen=True)
class PagedBatch:
    """One step's packed tokens: first the chunks of one token, then longer chunks of prompts.

    Attributes:
        num_decodes: the first rows, one token of one sequence each.
        max_rows: of the longest prompt chunk; 0: there is none.
        num_splits: into how many parts each decode's keys are cut.
        integers: int32, on the device:
            positions: (tokens,).
            slots: (tokens,), block * block_size + offset of where each token's key and value go;
                -1: nowhere.
            tables: (sequences, width), the blocks of each in order, then zeros.
            lengths: (sequences,), how many keys each has, this step's included; 0: padding.
            row_starts: (chunks + 1,), where each prompt chunk begins, and where the last ends.
    """

    num_decodes: int
    max_rows: int
    num_splits: int
    integers: Integers

    @classmethod
    def build(
        cls,
        spans: Sequence[Span],
        shape: KVCacheShape,
        device: torch.device,
        more: Mapping[str, IntArray] | None = None,
    ) -> PagedBatch:
        """From the step's chunks, those of one token first.

        Args:
            more: to be sent with the layout; afterwards in `integers`.
        """
        num_decodes = sum(1 for span in spans if span.end - span.start == 1)
        width = max((-(-span.end // shape.block_size) for span in spans), default=0)
        arrays = {**layout(spans, shape.block_size, len(spans), width), **(more or {})}
        integers = Integers({name: array.shape for name, array in arrays.items()}, device)
        integers.load(arrays)
        return cls(
            num_decodes=num_decodes,
            max_rows=max((span.end - span.start for span in spans[num_decodes:]), default=0),
            num_splits=_num_splits(num_decodes, width, shape, device),
            integers=integers,
        )

    @classmethod
    def padded(
        cls,
        sequences: int,
        width: int,
        shape: KVCacheShape,
        device: torch.device,
        more: Mapping[str, tuple[int, ...]] | None = None,
    ) -> PagedBatch:
        """Room for `sequences` decodes, to capture a CUDA graph with and then `load` each step.

        As it is, all rows are padding: they write nothing to the cache and attend to nothing.

        Args:
            width: of the tables, in blocks; no sequence may ever have more.
            more: shapes of what is sent with the layout; in `integers`, zeros at first.
        """
        arrays = layout([], shape.block_size, sequences, width)
        more = more or {}
        shapes = {name: array.shape for name, array in arrays.items()}
        integers = Integers({**shapes, **more}, device)
        integers.load({**arrays, **{name: np.zeros(s, np.int32) for name, s in more.items()}})
        return cls(
            num_decodes=sequences,
            max_rows=0,
            num_splits=_num_splits(sequences, width, shape, device),
            integers=integers,
        )

    def load(
        self,
        spans: Sequence[Span],
        shape: KVCacheShape,
        more: Mapping[str, IntArray] | None = None,
    ) -> None:
        """Puts a step's decodes, at most as many as there is room for, where `padded` made room."""
        sequences, width = self.tables.shape
        self.integers.load({**layout(spans, shape.block_size, sequences, width), **(more or {})})

    @property
    def positions(self) -> Tensor:
        return self.integers["positions"]

    @property
    def tables(self) -> Tensor:
        return self.integers["tables"]

    def to(self, device: torch.device) -> PagedBatch:
        """The same layout, for layers on another device."""
        return replace(self, integers=self.integers.to(device))

    def attend(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int
    ) -> Tensor:
        """See `StepLayout.attend`. Overwrites the queries in `qkv`."""
        from models.gpu.decode_attention import decode_attention
        from models.gpu.prefill_attention import prefill_attention
        from models.gpu.rotary import rotate_and_store

        keys, values = cache.keys[layer], cache.values[layer]
        q = rotate_and_store(qkv, *rotation, self.integers["slots"], keys, values)
        out = q.new_empty(q.shape)
        decodes, lengths = self.num_decodes, self.integers["lengths"]
        if decodes:
            decode_attention(
                q[:decodes], keys, values, self.tables, lengths, self.num_splits, out[:decodes]
            )
        if self.max_rows:
            prefill_attention(
                q, keys, values, self.tables, lengths, self.integers["row_starts"],
                self.max_rows, decodes, out,
            )  # fmt: skip
        return out


def layout(
    spans: Sequence[Span], block_size: int, sequences: int, width: int
) -> dict[str, IntArray]:
    """`PagedBatch.integers` of the spans, with rows of padding up to `sequences` where all spans
    are decodes."""
    count = len(spans)
    starts = np.fromiter((span.start for span in spans), np.int32, count)
    ends = np.fromiter((span.end for span in spans), np.int32, count)
    sizes = ends - starts
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    tokens, padding = int(offsets[-1]), sequences - count

    tables = np.zeros((sequences, width), np.int32)
    used = (-(-ends // block_size)).tolist()
    for table, span, blocks in zip(tables, spans, used, strict=False):
        table[:blocks] = span.block_table[:blocks]
    lengths = np.zeros(sequences, np.int32)
    lengths[:count] = ends
    positions = np.zeros(tokens + padding, np.int32)
    positions[:tokens] = np.arange(tokens) + np.repeat(starts - offsets[:-1], sizes)
    sequence, own = np.repeat(np.arange(count), sizes), positions[:tokens]
    slots = np.full(tokens + padding, -1, np.int32)
    slots[:tokens] = tables[sequence, own // block_size] * block_size + own % block_size
    return {
        "positions": positions,
        "slots": slots,
        "tables": tables,
        "lengths": lengths,
        "row_starts": offsets[int((sizes == 1).sum()) :],
    }


def _num_splits(sequences: int, width: int, shape: KVCacheShape, device: torch.device) -> int:
    tokens = width * shape.block_size
    return split_count(sequences, shape.num_kv_heads, tokens, num_multiprocessors(device))
