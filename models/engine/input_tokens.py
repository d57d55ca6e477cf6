"""What a step reads of its sequences: token ids, and where their keys lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine.in_flight import InFlight
from models.engine.scheduler import Batch, Chunk
from models.engine.sequence import IN_FLIGHT
from models.language.attention import Span

KNOWN = -1


class InputTokens(NamedTuple):
    """Of a step's packed chunks.

    Attributes:
        ids: (tokens,) int64; pictures' positions are negative.
        sources: (tokens,) int64, KNOWN, or which of the tokens in flight it will be. Those never
            come here: they go from tensor to tensor.
    """

    ids: NDArray[np.int64]
    sources: NDArray[np.int64]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], in_flight: InFlight | None) -> InputTokens:
        ids = np.concatenate(
            [np.frombuffer(c.seq.token_ids, dtype=np.int64)[c.start : c.end] for c in chunks]
        )
        sources = np.full(len(ids), KNOWN)
        (unknown,) = np.nonzero(ids == IN_FLIGHT)
        if unknown.size:
            assert in_flight is not None
            row_of = {id(seq): row for row, seq in enumerate(in_flight.seqs)}
            ends = np.cumsum([chunk.end - chunk.start for chunk in chunks])
            whose = np.searchsorted(ends, unknown, side="right")
            sources[unknown] = [row_of[id(chunks[index].seq)] for index in whose]
        return cls(ids, sources)


def spans_of(batch: Batch) -> list[Span]:
    return [Span(c.start, c.end, c.seq.block_table) for c in batch.chunks]
