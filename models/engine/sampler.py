"""Logits -> tokens, for a whole batch at once.

A sampled token is the one at which the cumulated probability passes a number u in [0, 1). u
depends only on the request's seed and on how many tokens it has produced, so that an answer does
not depend on which requests share its steps, nor on having been preempted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from math import inf

import numpy as np
import torch
from torch import Tensor

from models.engine.guidance import forbidden_tokens
from models.engine.messages import TokenLogprobs
from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import INVALID_TOKEN, Samples
from models.engine.sequence import Sequence
from models.transfer import Download, upload

HIGHEST_TEMPERATURE = torch.finfo(torch.float32).max
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of the stream `seed`: SplitMix64 (Steele et al., 2014)."""
    state = ((seed & _MASK) * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


class Sampler:
    """Chooses one token per row. Keeps no state of requests.

    In vLLM's order: a guide's mask, log-probabilities, biases, penalties, `min_tokens`, and then
    temperature and filters. What no row asks for costs nothing.
    """

    def __init__(self, eos_token_ids: Iterable[int] = ()) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def sample(self, logits: Tensor, seqs: Rows[Sequence]) -> SampledTokens:
        """Starts the sampling; nothing here waits for the device.

        Args:
            logits: (len(seqs), vocabulary), float32; may be written to.
            seqs: whose next token each row is.
        """
        _apply_guides(logits, seqs)
        asking = _rows(seqs, lambda params: params.logprobs is not None)
        raw = logits[upload(asking, logits.device)].log_softmax(dim=-1) if asking else None
        _add_biases(logits, seqs)
        _penalise(logits, seqs)
        self._forbid_ends(logits, seqs)
        best, tokens = logits.max(dim=-1)
        drawn = _rows(seqs, lambda params: not params.greedy)
        if drawn:
            rows = upload(drawn, logits.device)
            tokens[rows] = _draw(logits[rows], [seqs[row] for row in drawn])
        # One transfer per step: the check rides along with the tokens, and so do the logprobs.
        tokens = torch.where(best.isfinite(), tokens, INVALID_TOKEN)
        if raw is None:
            return SampledTokens(tokens, Download(tokens), [None] * len(seqs))
        wanted = [seq.params.logprobs for seq in seqs]
        return SampledTokens(tokens, Download(_with_logprobs(tokens, raw, asking, wanted)), wanted)

    def _forbid_ends(self, logits: Tensor, seqs: Rows[Sequence]) -> None:
        """`min_tokens`: no end before; except where a guide allows nothing else."""
        early = [
            row for row, seq in enumerate(seqs) if seq.num_output_tokens < seq.params.min_tokens
        ]
        ends = [
            (index, token)
            for index, row in enumerate(early)
            for token in self._ends_of(seqs[row])
            if token < logits.shape[-1]
        ]
        if ends:
            at, forbidden = upload(ends, logits.device).unbind(dim=1)
            rows = upload(early, logits.device)
            before = logits[rows]
            after = before.index_put((at, forbidden), before.new_full((), -torch.inf))
            has_others = after.amax(dim=-1, keepdim=True) > -torch.inf
            logits[rows] = torch.where(has_others, after, before)

    def _ends_of(self, seq: Sequence) -> set[int]:
        own = set(seq.params.stop_token_ids)
        return own if seq.params.ignore_eos and seq.guide is None else own | self._eos_token_ids


class SampledTokens:
    """A step's tokens, on the device at once and here when they have been fetched.

    Attributes:
        tokens: (rows,) int64, on the device; INVALID_TOKEN where the logits are not numbers.
    """

    def __init__(self, tokens: Tensor, download: Download, wanted: Rows[int | None]) -> None:
        """
        Args:
            download: of the tokens, or of `_with_logprobs`' table where any are wanted.
            wanted: how many alternatives each row asks for; None: no log-probabilities at all.
        """
        self.tokens = tokens
        self._download = download
        self._wanted = wanted

    def fetch(self) -> Samples:
        """Waits for the device."""
        table = self._download.fetch()
        if table.dim() == 1:
            return Samples(table.tolist(), [None] * len(self._wanted))
        lines = table.tolist()
        logprobs = [
            None if wanted is None else _logprobs_of(line, wanted)
            for line, wanted in zip(lines, self._wanted, strict=True)
        ]
        return Samples([int(line[0]) for line in lines], logprobs)


def _logprobs_of(line: list[float], wanted: int) -> TokenLogprobs:
    token, logprob, *rest = line
    width = len(rest) // 2
    pairs = list(zip(map(int, rest[:width]), rest[width:], strict=True))[:wanted]
    return TokenLogprobs(int(token), logprob, tuple(pair for pair in pairs if pair[1] > -inf))


def _rows(seqs: Rows[Sequence], wanted: Callable[[SamplingParams], bool]) -> list[int]:
    return [row for row, seq in enumerate(seqs) if wanted(seq.params)]


def _apply_guides(logits: Tensor, seqs: Rows[Sequence]) -> None:
    guided = [(row, matcher) for row, seq in enumerate(seqs) if (matcher := seq.matcher)]
    if not guided:
        return
    rows, matchers = zip(*guided, strict=True)
    forbidden = upload(forbidden_tokens(matchers, logits.shape[-1]), logits.device)
    if len(rows) == len(seqs):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        at = upload(rows, logits.device)
        logits[at] = logits[at].masked_fill(forbidden, -torch.inf)


def _add_biases(logits: Tensor, seqs: Rows[Sequence]) -> None:
    biases = [
        (row, token, bias)
        for row, seq in enumerate(seqs)
        for token, bias in seq.params.biases
        if token < logits.shape[-1]
    ]
    if biases:
        rows, tokens, values = upload(biases, logits.device, torch.float64).unbind(dim=1)
        logits.index_put_((rows.long(), tokens.long()), values.to(logits), accumulate=True)


def _penalise(logits: Tensor, seqs: Rows[Sequence]) -> None:
    """Repetition penalty (Keskar et al., 2019): divides positive logits, multiplies others, over
    prompt and answer. OpenAI's two are subtracted, and count the answer only."""

    def column(chosen: list[int], value: Callable[[SamplingParams], float]) -> Tensor:
        values = [value(seqs[row].params) for row in chosen]
        return upload(values, logits.device, torch.float32).unsqueeze(1)

    repeated = _rows(seqs, lambda params: params.repetition_penalty != 1.0)
    if repeated:
        seen = _counts([seqs[row].token_ids for row in repeated], logits) > 0
        penalty = column(repeated, lambda params: params.repetition_penalty)
        rows = upload(repeated, logits.device)
        scores = logits[rows]
        scaled = torch.where(scores > 0, scores / penalty, scores * penalty)
        logits[rows] = torch.where(seen, scaled, scores)
    counted = _rows(seqs, lambda p: p.presence_penalty != 0 or p.frequency_penalty != 0)
    if counted:
        counts = _counts([seqs[i].token_ids[seqs[i].num_prompt_tokens :] for i in counted], logits)
        by_count = counts * column(counted, lambda params: params.frequency_penalty)
        by_presence = (counts > 0) * column(counted, lambda params: params.presence_penalty)
        logits[upload(counted, logits.device)] -= by_count + by_presence


def _counts(token_ids: Rows[array[int]], logits: Tensor) -> Tensor:
    """(rows, vocabulary) int32: how often each token occurs. Pictures' positions are no tokens."""
    vocabulary = logits.shape[-1]
    ids = np.concatenate([np.frombuffer(row, dtype=np.int64) for row in token_ids])
    rows = np.repeat(np.arange(len(token_ids)), [len(row) for row in token_ids])
    is_token = (ids >= 0) & (ids < vocabulary)
    at = upload((rows * vocabulary + ids)[is_token], logits.device)
    counts = torch.zeros(len(token_ids) * vocabulary, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
    return counts.view(len(token_ids), vocabulary)


def _with_logprobs(
    tokens: Tensor, raw: Tensor, asking: list[int], wanted: Rows[int | None]
) -> Tensor:
    """(rows, 2 + 2 * width) float64, in which every token id is exact: each row's token, its
    log-probability, and the likeliest tokens with theirs; zeros where no row asks.

    Args:
        raw: (len(asking), vocabulary) log-probabilities of the rows `asking`.
    """
    width = min(max(wanted[row] or 0 for row in asking), raw.shape[-1])
    rows = upload(asking, raw.device)
    chosen = raw.gather(1, tokens[rows].clamp(min=0).unsqueeze(1))
    values, ids = raw.topk(width, dim=-1)
    table = tokens.new_zeros((len(tokens), 2 + 2 * width), dtype=torch.float64)
    table[:, 0] = tokens
    table[rows, 1:] = torch.cat([chosen.double(), ids.double(), values.double()], dim=1)
    return table


def _draw(logits: Tensor, seqs: Rows[Sequence]) -> Tensor:
    """(rows,) token ids drawn from the filtered distributions."""
    device = logits.device

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return upload(values, device, dtype).unsqueeze(1)

    params = [seq.params for seq in seqs]
    # Finite in single precision, too: what is forbidden would become no number.
    temperatures = column([min(p.temperature, HIGHEST_TEMPERATURE) for p in params])
    probabilities = (logits / temperatures).softmax(dim=-1)
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
    top_k = upload(kept, device)
    ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), 0)
    # A token stays while the ones before it have not yet reached top_p; the first one always.
    top_p = upload([p.top_p for p in params], device, torch.float32).unsqueeze(1)
    # In double precision, since a GPU adds floats up in no fixed order.
    before = (ordered.double().cumsum(dim=-1) - ordered).to(ordered.dtype)
    reached = before >= top_p * ordered.sum(dim=-1, keepdim=True)
    ordered = ordered.masked_fill(reached & (top_p < 1) & (rank > 0), 0)
    return torch.zeros_like(probabilities).scatter(1, order, ordered)
