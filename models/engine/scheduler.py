"""Who computes how many tokens in the next step.

Requests wait in one line, first come first served, and run at most `max_num_seqs` at a time. A
step's budget of tokens goes to the running decodes first (one token each), then to prompts, cut
into chunks, so that a long prompt never stalls the streams; how much of prompts they bear is
`PrefillBudget`'s to say. A request whose beginning another one is just computing waits for it. When
the KV cache runs short the youngest running request gives its blocks back and is computed again
later; none is dropped.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace
from functools import partial
from math import isnan
from typing import NamedTuple

from models.engine.block_pool import BlockPool
from models.engine.messages import FinishReason, GenerationDelta, TokenLogprobs
from models.engine.prefill_budget import PrefillBudget
from models.engine.sequence import Sequence
from models.engine.token_gaps import TokenGaps
from models.errors import EngineFault, RequestTimeout, TinyChatError

INVALID_TOKEN = -1
"""What the sampler returns for a row whose logits are not numbers."""


class Samples(NamedTuple):
    """One entry for each row.

    Attributes:
        tokens: INVALID_TOKEN where the logits are not numbers.
        logprobs: where the row's request asks for them.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of one sequence, to be computed in one step.

    Attributes:
        samples: whether the next token comes out of it: it reaches the end of what is there.
    """

    seq: Sequence
    start: int
    end: int
    samples: bool


@dataclass
class Batch:
    """The chunks of one step: single tokens first, longer prompt chunks after them."""

    chunks: list[Chunk] = field(default_factory=list)

    num_decodes: int = 0
    """Sequences that advance by one token of their answers."""

    @property
    def sampling(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.samples]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens - self.num_decodes


class Scheduler:
    """Owns the waiting line, the running list and the block pool."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Iterable[int],
        max_prefill_slowdown: float | None = None,
    ) -> None:
        """
        Args:
            max_prefill_slowdown: see `EngineOptions`.
        """
        self.pool = pool
        self.prefill_budget = PrefillBudget(max_prefill_slowdown)
        self.max_num_seqs = max_num_seqs
        # Every running decode must fit into a step.
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.token_gaps = TokenGaps()

    @property
    def has_work(self) -> bool:
        """Whether a step would do something. Guides that are being compiled are nobody's work."""
        return bool(self.running) or any(seq.is_ready for seq in self.waiting)

    @property
    def _has_slot(self) -> bool:
        return len(self.running) < self.max_num_seqs

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)
        self.prefill_budget.arrive()

    def find(self, request_id: str) -> Sequence | None:
        for seq in (*self.running, *self.waiting):
            if seq.request_id == request_id:
                return seq
        return None

    def expire(self, now: float) -> list[GenerationDelta]:
        """Ends the requests that have waited past their deadline and never ran."""
        late = [s for s in self.waiting if s.deadline is not None and s.deadline <= now]
        error = RequestTimeout("the request waited too long for its turn; the server is busy")
        return [self.finish(seq, "error", error=error) for seq in late]

    def refuse(self) -> list[GenerationDelta]:
        """Ends the requests whose guides turned out to be wrong."""
        refused = []
        for seq in list(self.waiting):
            if seq.guide is not None and seq.guide.done():
                error = seq.guide.exception()
                if isinstance(error, TinyChatError):
                    refused.append(self.finish(seq, "error", error=error))
                elif error is not None:
                    fault = EngineFault(f"the guide's compiler failed: {type(error).__name__}")
                    refused.append(self.finish(seq, "error", error=fault))
        return refused

    def schedule(self) -> Batch:
        """Chooses the next step's chunks and gives them their KV blocks. From then on they count as
        computed: steps are computed in the order in which they are scheduled."""
        batch = Batch()
        budget = self.max_num_batched_tokens
        preempted = self.num_preemptions
        advancing = [s for s in self.running if not s.has_last_in_flight]
        for seq in [s for s in advancing if s.num_uncomputed == 1]:
            if seq in self.running and self._grow(seq):
                budget -= self._schedule(seq, 1, batch)
        scheduled = {id(chunk.seq) for chunk in batch.chunks}
        batch.num_decodes = len(batch.chunks)
        if batch.chunks and (most := self.prefill_budget.tokens()) is not None:
            budget = min(budget, most)
        for seq in advancing:
            if id(seq) not in scheduled and seq in self.running and budget > 0:
                budget -= self._schedule(seq, budget, batch)
        if self.num_preemptions == preempted and budget > 0 and self._has_slot and self.waiting:
            coming = {key for seq in self.running for key in self._keys_to_come(seq)}
            for seq in [s for s in self.waiting if s.is_ready]:
                if budget <= 0:
                    break
                if self._gains_by_waiting(seq, coming):
                    continue
                if not self._admit(seq):
                    break
                budget -= self._schedule(seq, budget, batch)
                coming.update(self._keys_to_come(seq))
        batch.chunks.sort(key=_is_long)
        return batch

    def halve(self, batch: Batch) -> Batch:
        """The first half of a batch's tokens; the rest is left to later steps."""
        chunks, left = [], batch.num_tokens // 2
        for chunk in batch.chunks:
            end = min(chunk.end, chunk.start + left)
            left -= end - chunk.start
            chunk.seq.num_computed = end
            if end > chunk.start:
                chunks.append(replace(chunk, end=end, samples=chunk.samples and end == chunk.end))
        chunks.sort(key=_is_long)
        return Batch(chunks, min(batch.num_decodes, len(chunks)))

    def commit(
        self, batch: Batch, sampled: Sequences[Sequence], samples: Samples
    ) -> list[GenerationDelta]:
        """Books a computed batch. What has ended meanwhile gains nothing by it.

        Args:
            sampled: the sequences whose next tokens the samples are.
        """
        now = time.monotonic()
        for chunk in batch.chunks:
            self._remember_full_blocks(chunk.seq, chunk.end)
        last_tokens = (seq.last_token_at for seq in sampled if not seq.ended)
        oldest = min((at for at in last_tokens if at is not None), default=None)
        if oldest is not None:
            self.token_gaps.add(now - oldest)
        return [
            self._book(seq, token, logprobs, now)
            for seq, token, logprobs in zip(sampled, *samples, strict=True)
            if not seq.ended
        ]

    def finish(
        self, seq: Sequence, reason: FinishReason, text: str = "", token_ids: tuple[int, ...] = (),
        error: TinyChatError | None = None, logprobs: tuple[TokenLogprobs, ...] = (),
        stop_reason: str | int | None = None,
    ) -> GenerationDelta:  # fmt: skip
        """The one way out: frees everything that the sequence holds, wherever it is."""
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self.pool.release(seq.block_table)
        usage = seq.usage
        seq.ended = True
        seq.forget_computed()
        return GenerationDelta(
            seq.request_id, text, token_ids, reason, usage, error, logprobs, stop_reason, seq.timing
        )

    def check_integrity(self) -> None:
        self.pool.check_integrity(seq.block_table for seq in self.running)
        if any(seq.block_table for seq in self.waiting):
            raise AssertionError("a waiting sequence holds KV blocks")

    def _schedule(self, seq: Sequence, budget: int, batch: Batch) -> int:
        """Appends a sequence's next chunk, whose blocks it has got; returns its size."""
        start, end = seq.num_computed, min(len(seq.token_ids), seq.num_computed + budget)
        batch.chunks.append(Chunk(seq, start, end, samples=end == len(seq.token_ids)))
        seq.num_computed = end
        return end - start

    def _keys_to_come(self, seq: Sequence) -> list[bytes]:
        """Of the full blocks that a running sequence is to compute, or is just computing."""
        if not self.pool.enable_prefix_caching:
            return []
        full = seq.num_tokens // self.pool.block_size
        return [seq.prefix.block(i, seq.token_ids)[0] for i in range(seq.num_known_blocks, full)]

    def _gains_by_waiting(self, seq: Sequence, coming: set[bytes]) -> bool:
        """Whether running sequences are about to compute most of what a waiting one still needs.

        Such a one lets others pass until then, so that many users of one long system prompt, or of
        one picture, have it computed once, even if they all come at the same time.
        """
        if not coming:
            return False
        last = seq.num_sparable
        index = known = len(self.pool.match(seq.prefix, seq.token_ids, last))
        while index < last // self.pool.block_size:
            if seq.prefix.block(index, seq.token_ids)[0] not in coming:
                break
            index += 1
        size = self.pool.block_size
        return (index - known) * size > len(seq.token_ids) - index * size

    def _admit(self, seq: Sequence) -> bool:
        """Moves a waiting sequence to the running ones if slot and blocks are there."""
        if not self._has_slot:
            return False
        matched = self.pool.match(seq.prefix, seq.token_ids, seq.num_sparable)
        num_new = self.pool.blocks_for(len(seq.token_ids)) - len(matched)
        if not self.pool.can_allocate(num_new, matched):
            return False
        self.pool.take(matched)
        seq.block_table = array("q", matched + self.pool.allocate(num_new))
        seq.num_known_blocks = len(matched)
        seq.num_computed = len(matched) * self.pool.block_size
        if seq.started_at is None:
            seq.started_at = time.monotonic()
        if seq.num_output_tokens == 0:
            seq.num_cached = seq.num_computed
            self.prefix_query_tokens += seq.num_prompt_tokens
            self.prefix_hit_tokens += seq.num_computed
        self.waiting.remove(seq)
        self.running.append(seq)
        return True

    def _grow(self, seq: Sequence) -> bool:
        """Makes room for the sequence's next token, at the expense of younger ones if need be.

        Returns False if the sequence itself was the youngest and had to give way.
        """
        while self.pool.blocks_for(len(seq.token_ids)) > len(seq.block_table):
            if self.pool.can_allocate(1):
                seq.block_table.extend(self.pool.allocate(1))
            else:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.release(seq.block_table)
        seq.forget_computed()
        seq.deadline = None  # it has had its turn; from now on it only may not be dropped
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _remember_full_blocks(self, seq: Sequence, num_computed: int) -> None:
        if not seq.block_table:
            return  # ended or preempted since the step was scheduled
        for index in range(seq.num_known_blocks, num_computed // self.pool.block_size):
            self.pool.remember(seq.block_table[index], *seq.prefix.block(index, seq.token_ids))
            seq.num_known_blocks = index + 1

    def _book(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> GenerationDelta:
        """One sampled token, and before the first one the prompt's."""
        seq.land()
        scores = seq.take_scores()
        if any(score.logprob is not None and isnan(score.logprob) for score in scores):
            token = INVALID_TOKEN
        if token != INVALID_TOKEN and seq.params.max_new_tokens == 0:
            self.num_prompt_tokens += seq.num_prompt_tokens
            delta = self.finish(seq, "length")
        else:
            delta = self._append(seq, token, logprobs, now)
        return replace(delta, prompt_logprobs=scores) if scores else delta

    def _append(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> GenerationDelta:
        """Books one sampled token: its text, and whether it ends the answer."""
        matcher = seq.matcher
        if matcher is not None and token != INVALID_TOKEN:
            matcher.advance(token)
        if matcher is not None and (error := matcher.error) is not None:
            return self.finish(seq, "error", error=error)
        if token == INVALID_TOKEN:
            fault = EngineFault("the model's output is not a number for this input")
            return self.finish(seq, "error", error=fault)
        seq.token_ids.append(token)
        is_first = seq.first_token_at is None
        if is_first:
            seq.first_token_at = now
            self.num_prompt_tokens += seq.num_prompt_tokens
        seq.last_token_at = now
        self.num_generated_tokens += 1
        end = partial(
            self.finish, seq, token_ids=(token,), logprobs=() if logprobs is None else (logprobs,)
        )
        # A guide allows the end of sequence only where its answer is complete.
        if token in self.eos_token_ids and not (seq.params.ignore_eos and matcher is None):
            return end("stop", seq.text.finish())
        if token in seq.params.stop_token_ids:
            return end("stop", seq.text.finish(), stop_reason=token)
        text = seq.text.append(token)
        is_complete = matcher is not None and matcher.has_ended
        if not seq.text.stopped and (is_complete or len(seq.token_ids) >= seq.max_len):
            text += seq.text.finish()
            if not seq.text.stopped:
                return end("stop" if is_complete else "length", text)
        if seq.text.stopped:
            return end("stop", text, stop_reason=seq.text.stop_reason)
        return GenerationDelta(
            seq.request_id, text, (token,), usage=seq.usage,
            logprobs=() if logprobs is None else (logprobs,),
            timing=seq.timing if is_first else None,
        )  # fmt: skip


def _is_long(chunk: Chunk) -> bool:
    return chunk.end - chunk.start > 1
