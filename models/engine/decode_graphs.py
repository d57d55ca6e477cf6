"""Steps of nothing but decodes, captured once in CUDA graphs and launched with one call each.

A step of a 7B is some 300 kernels of a few microseconds, and launching one from Python takes about
as long. A graph always reads and writes the same memory: before each launch the step's integers are
copied to where it reads them, all at once, and rows that a step leaves over are padding.

tokens in flight ──> previous ──┐
host: ids, layout ──> integers ─┴─> [ embed ── layers ── head ] ──> logits, until the next launch
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from models.engine.in_flight import InFlight
from models.engine.input_tokens import KNOWN, InputTokens, spans_of
from models.engine.scheduler import Batch
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache
from models.language.paged_batch import PagedBatch

logger = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before a capture, in which kernels are compiled and libraries take their workspaces."""

Capture: TypeAlias = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""A computation -> its replay, which returns the same tensor each time, computed anew."""


class DecodeGraphs:
    """One graph for each power of two of rows, all in one pool of memory."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, capture: Capture, *, max_rows: int, max_tokens: int
    ) -> None:
        """
        Args:
            decoder: all on one device.
            max_rows: sequences in a step at most.
            max_tokens: that a sequence may ever have.
        """
        device = decoder.placement.embedding
        width = -(-max_tokens // cache.shape.block_size)
        self._previous = torch.zeros(max_rows, dtype=torch.long, device=device)
        # The largest first: the others find room in its memory.
        self._graphs = {
            rows: DecodeGraph(decoder, cache, capture, self._previous, rows=rows, width=width)
            for rows in reversed(graph_sizes(max_rows))
        }

    @property
    def sizes(self) -> list[int]:
        return sorted(self._graphs)

    def can_run(self, batch: Batch) -> bool:
        """Whether it is one token of each sequence, none of them a picture's or to be scored."""
        return len(batch.chunks) <= len(self._previous) and all(
            chunk.samples
            and chunk.end - chunk.start == 1
            and all(span.end <= chunk.start for span in chunk.seq.images)
            and (chunk.start > 0 or chunk.seq.params.prompt_logprobs is None)
            for chunk in batch.chunks
        )

    def run(self, batch: Batch, in_flight: InFlight | None) -> Tensor:
        """(len(batch.chunks), vocabulary) float32 logits; overwritten by the next run.

        Args:
            in_flight: see `ModelRunner.run`.
        """
        if in_flight is not None:
            self._previous[: len(in_flight.seqs)].copy_(in_flight.tokens)
        rows = len(batch.chunks)
        fitting = min(size for size in self._graphs if size >= rows)
        return self._graphs[fitting].run(batch, in_flight)[:rows]


class DecodeGraph:
    """A step of `rows` decodes."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        capture: Capture,
        previous: Tensor,
        *,
        rows: int,
        width: int,
    ) -> None:
        """
        Args:
            previous: (at least `rows`,) int64: the tokens in flight, when it runs.
            width: of the block tables.
        """
        self._rows = rows
        self._decoder = decoder
        self._cache = cache
        self._previous = previous
        self._layout = PagedBatch.padded(
            rows, width, cache.shape, previous.device, {"ids": (rows,), "sources": (rows,)}
        )
        self._replay = capture(self._compute)

    def run(self, batch: Batch, in_flight: InFlight | None) -> Tensor:
        tokens = InputTokens.of(batch.chunks, in_flight)
        more = {
            "ids": np.zeros(self._rows, np.int32),
            "sources": np.full(self._rows, KNOWN, np.int32),
        }
        more["ids"][: len(tokens.ids)] = tokens.ids
        more["sources"][: len(tokens.sources)] = tokens.sources
        self._layout.load(spans_of(batch), self._cache.shape, more)
        return self._replay()

    def _compute(self) -> Tensor:
        ids, sources = self._layout.integers["ids"], self._layout.integers["sources"]
        in_flight = self._previous.index_select(0, sources.clamp(min=0))
        ids = torch.where(sources == KNOWN, ids, in_flight).clamp(min=0)
        hidden = self._decoder(self._decoder.embed(ids), self._cache, self._layout)
        return self._decoder.logits(hidden)


def graph_sizes(max_rows: int) -> list[int]:
    """Powers of two, and `max_rows` itself."""
    return [*(1 << i for i in range((max_rows - 1).bit_length())), max_rows]


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share their memory: they must be replayed one after the other."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device), torch.inference_mode():
            here = torch.cuda.current_stream(device)
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    compute()
            here.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    out = compute()
            finally:
                torch.cuda.set_stream(here)  # torch stays on the capture's where that has failed

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


def capture_decodes(
    decoder: Decoder, cache: KVCache, *, max_rows: int, max_tokens: int
) -> DecodeGraphs | None:
    """The graphs, or None, with the reason logged, where something in a step cannot be captured."""
    try:
        capture = cuda_capture(decoder.placement.embedding)
        return DecodeGraphs(decoder, cache, capture, max_rows=max_rows, max_tokens=max_tokens)
    except RuntimeError as error:
        logger.warning("no CUDA graphs, each step's kernels are launched one by one: %s", error)
        return None
