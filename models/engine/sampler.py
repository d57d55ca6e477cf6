"""Logits -> tokens, for a whole batch at once.

A sampled token is the one at which the cumulated probability passes a number u in [0, 1). u
depends only on the request's seed and on how many tokens it has produced, so that an answer does
not depend on which requests share its steps, nor on having been preempted.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import INVALID_TOKEN
from models.engine.sequence import Sequence

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of the stream `seed`: SplitMix64 (Steele et al., 2014)."""
    state = ((seed & _MASK) * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


class Sampler:
    """Chooses one token per row. Keeps no state."""

    def sample(self, logits: Tensor, seqs: Rows[Sequence]) -> list[int]:
        """
        Args:
            logits: (len(seqs), vocabulary), float32; may be written to.
            seqs: whose next token each row is.

        Returns:
            One token id per row; INVALID_TOKEN where the logits are not numbers.
        """
        if not seqs:
            return []
        self._penalise(logits, seqs)
        best, tokens = logits.max(dim=-1)
        drawn = [row for row, seq in enumerate(seqs) if not seq.params.greedy]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            tokens[rows] = _draw(logits[rows], [seqs[row] for row in drawn])
        # One transfer per step: the check rides along with the tokens.
        return torch.where(best.isfinite(), tokens, INVALID_TOKEN).tolist()

    def _penalise(self, logits: Tensor, seqs: Rows[Sequence]) -> None:
        """Repetition penalty (Keskar et al., 2019): divides positive logits, multiplies others."""
        for row, seq in enumerate(seqs):
            penalty = seq.params.repetition_penalty
            if penalty != 1.0:
                seen = seq.seen_tokens(logits.shape[-1], logits.device)
                scores = logits[row]
                scaled = torch.where(scores > 0, scores / penalty, scores * penalty)
                logits[row] = torch.where(seen, scaled, scores)


def _draw(logits: Tensor, seqs: Rows[Sequence]) -> Tensor:
    """(rows,) token ids drawn from the filtered distributions."""
    device = logits.device

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    params = [seq.params for seq in seqs]
    probabilities = (logits / column([p.temperature for p in params])).softmax(dim=-1)
    if any(0 < p.top_k < logits.shape[-1] or p.top_p < 1 for p in params):
        probabilities = _keep_likeliest(probabilities, params)
    if any(p.min_p > 0 for p in params):
        least = column([p.min_p for p in params]) * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # Cumulated in the vocabulary's order, whichever filters the neighbours use; and in double
    # precision, or the unlikely tokens of a large vocabulary would vanish in the sum.
    cumulated = probabilities.double().cumsum(dim=-1)
    u = column([uniform(seq.seed, seq.num_output_tokens) for seq in seqs], torch.float64)
    picked = torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)
    # Rounding can put the target at the very end: take the last token that has a share.
    last = (probabilities > 0) * torch.arange(logits.shape[-1], device=device)
    return torch.minimum(picked, last.amax(dim=-1, keepdim=True)).squeeze(1)


def _keep_likeliest(probabilities: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """Zeroes what lies outside of each row's top_k, and then of its top_p."""
    device, vocabulary = probabilities.device, probabilities.shape[-1]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=device)
    kept = [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params]
    top_k = torch.tensor(kept, device=device)
    ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), 0)
    # A token stays while the ones before it have not yet reached top_p; the first one always.
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
    before = ordered.cumsum(dim=-1) - ordered
    reached = before >= top_p * ordered.sum(dim=-1, keepdim=True)
    ordered = ordered.masked_fill(reached & (top_p < 1) & (rank > 0), 0)
    return torch.zeros_like(probabilities).scatter(1, order, ordered)
