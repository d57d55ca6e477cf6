"""A step that has been handed to the device."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from torch import Tensor

from models.engine.sampler import SampledTokens
from models.engine.scheduler import Batch
from models.engine.sequence import Sequence


@dataclass(frozen=True)
class InFlight:
    """
    Attributes:
        seqs: whose next tokens it samples, row by row.
        started: by `time.perf_counter`, when it was begun.
    """

    batch: Batch
    seqs: Sequences[Sequence]
    samples: SampledTokens
    started: float

    @property
    def tokens(self) -> Tensor:
        """(len(seqs),) int64, on the device."""
        return self.samples.tokens

    @property
    def is_awaited(self) -> bool:
        """Whether anyone still wants its tokens."""
        return any(not seq.ended for seq in self.seqs)
