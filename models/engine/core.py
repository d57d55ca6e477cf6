"""The engine without its thread: requests in, one `step()` at a time, deltas out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from models.engine.block_pool import BlockPool
from models.engine.guidance import GuideCompiler
from models.engine.in_flight import InFlight
from models.engine.memory import OUT_OF_MEMORY, release_memory
from models.engine.messages import EngineStats, GenerationDelta, GenerationRequest
from models.engine.runner import ModelRunner
from models.engine.sampler import Sampler
from models.engine.scheduler import Batch, Scheduler
from models.engine.sequence import Sequence
from models.errors import EngineFault, RequestAborted
from models.prompts import Tokenizer
from models.transfer import upload

logger = logging.getLogger(__name__)


class EngineCore:
    """Single-threaded and deterministic: what tests and profilers drive directly."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        max_prefill_slowdown: float | None = None,
        async_scheduling: bool = False,
    ) -> None:
        """
        Args:
            max_prefill_slowdown, async_scheduling: see `EngineOptions`.
        """
        self.runner = runner
        eos_token_ids = frozenset(eos_token_ids)
        self.sampler = Sampler(eos_token_ids)
        self.guides = GuideCompiler(tokenizer, eos_token_ids)
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(
            BlockPool(
                runner.cache.num_blocks,
                runner.cache.shape.block_size,
                enable_prefix_caching=enable_prefix_caching,
            ),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            eos_token_ids=eos_token_ids,
            max_prefill_slowdown=max_prefill_slowdown,
        )
        self.async_scheduling = async_scheduling
        self._in_flight: InFlight | None = None
        self._last_landing = 0.0
        self._due: list[GenerationDelta] = []
        """Of the step that is under way; they outlive its failure."""
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        in_flight = self._in_flight is not None and self._in_flight.is_awaited
        return in_flight or self.scheduler.has_work

    def add(self, request: GenerationRequest, ready: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            ready: called, in another thread, when its guide has been compiled and there is work.
        """
        block_size = self.scheduler.pool.block_size
        seq = Sequence(request, self.tokenizer, block_size, self.max_model_len)
        if request.params.guide is not None:
            seq.guide = self.guides.submit(request.params.guide, ready)
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> list[GenerationDelta]:
        """Takes the request back, in whatever phase it is; nothing if it has ended already."""
        seq = self.scheduler.find(request_id)
        if seq is None:
            return []
        return [
            self.scheduler.finish(seq, "abort", error=RequestAborted("the request was aborted"))
        ]

    @torch.inference_mode()
    def step(self) -> list[GenerationDelta]:
        """Computes one batch; at most one delta per request.

        With `async_scheduling` the deltas are the previous step's, and this one stays in flight:

        device   ... model N, sampling N, model N + 1,                sampling N + 1, ...
        here     ...          schedule N + 1, fetch and commit N, deliver, ...

        So the device has always something to do, the sampling knows all tokens before its own, and
        a sequence that ends with step N has a row in N + 1 that nobody reads.
        """
        self._due += self.scheduler.expire(time.monotonic())
        self._due += self.scheduler.refuse()
        batch = self.scheduler.schedule()
        started = time.perf_counter()
        batch, logits = self._run(batch)
        self._land()
        if logits is not None:
            self.num_steps += 1
            self._in_flight = self._sample(batch, logits, started)
        if not self.async_scheduling:
            self._land()
        return self._take_due()

    def _take_due(self) -> list[GenerationDelta]:
        due, self._due = self._due, []
        return due

    def _run(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """As much of the batch as memory suffices for, and its logits. A request ends only if a
        single token of it is too much, which may have a picture about it."""
        has_released = False
        while batch.chunks:
            with suppress(*OUT_OF_MEMORY):
                return batch, self.runner.run(batch, self._in_flight)
            # Here the exception is gone, and with it the tensors that its traceback held.
            release_memory()
            if not has_released:
                has_released = True
            elif batch.num_tokens > 1:
                logger.warning("no memory for a step of %d tokens; it is halved", batch.num_tokens)
                batch = self.scheduler.halve(batch)
            else:
                error = EngineFault("the device's memory is too small for this request")
                self._due.append(self.scheduler.finish(batch.chunks[0].seq, "error", error=error))
                return Batch(), None
        return batch, None

    def _sample(self, batch: Batch, logits: Tensor, started: float) -> InFlight:
        sampling = [chunk.seq for chunk in batch.sampling]
        seqs = [seq for seq in sampling if not seq.ended]
        if len(seqs) < len(sampling):  # some have ended with the step before
            rows = [row for row, seq in enumerate(sampling) if not seq.ended]
            logits = logits[upload(rows, logits.device, torch.long)]
        samples = self.sampler.sample(logits, seqs)
        for seq in seqs:
            seq.take_off()
        return InFlight(batch, seqs, samples, started)

    def _land(self) -> None:
        """Books the step that is in flight."""
        if (step := self._in_flight) is None:
            return
        samples = step.samples.fetch()
        now = time.perf_counter()
        # Where all have ended nobody waited for it, and the engine may have been idle since.
        if any(not chunk.seq.ended for chunk in step.batch.chunks):
            self.scheduler.prefill_budget.observe(
                step.batch.num_decodes,
                step.batch.num_prompt_tokens,
                now - max(step.started, self._last_landing),
            )
        self._last_landing = now
        self._due += self.scheduler.commit(step.batch, step.seqs, samples)
        self._in_flight = None  # not before: `fail_running` lands what a failed commit has not

    def fail_running(self, error: Exception) -> list[GenerationDelta]:
        """After a step that raised: ends what was running, frees it all, keeps those waiting.

        What had ended before it raised is among the deltas, too.
        """
        if self._in_flight is not None:
            for seq in self._in_flight.seqs:
                seq.land()  # what it computed is lost with it
            self._in_flight = None
        fault = EngineFault(
            f"the engine failed while computing this request: {type(error).__name__}"
        )
        self._due += [
            self.scheduler.finish(seq, "error", error=fault) for seq in list(self.scheduler.running)
        ]
        return self._take_due()

    def check_idle(self) -> None:
        """When nothing runs or waits: raises AssertionError unless all blocks came back. O(1)."""
        self._in_flight = None  # nobody's any more
        pool = self.scheduler.pool
        if pool.num_used or pool.num_free + pool.num_cached != pool.num_blocks:
            raise AssertionError(
                f"idle, but {pool.num_free} free + {pool.num_cached} cached + {pool.num_used} used "
                f"of {pool.num_blocks} KV blocks"
            )

    def check_integrity(self) -> None:
        """Raises AssertionError if a KV block is leaked, lost or doubly owned. O(blocks)."""
        self.scheduler.check_integrity()

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            max_num_seqs=scheduler.max_num_seqs,
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            blocks_used=pool.num_used,
            block_size=pool.block_size,
            image_cache_bytes=self.runner.images.num_bytes,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            image_queries=self.runner.images.num_queries,
            image_hits=self.runner.images.num_hits,
            token_gaps=scheduler.token_gaps.counts,
        )
