"""The engine without its thread: requests in, one `step()` at a time, deltas out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from models.engine.block_pool import BlockPool
from models.engine.guidance import GuideCompiler
from models.engine.messages import EngineStats, GenerationDelta, GenerationRequest
from models.engine.runner import ModelRunner
from models.engine.sampler import Sampler
from models.engine.scheduler import Scheduler
from models.engine.sequence import Sequence
from models.errors import EngineFault, RequestAborted
from models.prompts import Tokenizer


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
    ) -> None:
        """
        Args:
            max_prefill_slowdown: see `EngineOptions`.
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
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

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
        """Computes one batch; at most one delta per request."""
        ended = self.scheduler.expire(time.monotonic()) + self.scheduler.refuse()
        batch = self.scheduler.schedule()
        if not batch.chunks:
            return ended
        self.num_steps += 1
        started = time.perf_counter()
        logits = self.runner.run(batch)
        samples = self.sampler.sample(logits, [chunk.seq for chunk in batch.sampling])
        self.scheduler.prefill_budget.observe(
            batch.num_decodes, batch.num_prompt_tokens, time.perf_counter() - started
        )
        return ended + self.scheduler.commit(batch, samples)

    def fail_running(self, error: Exception) -> list[GenerationDelta]:
        """After a step that raised: ends what was running, frees it all, keeps those waiting."""
        fault = EngineFault(
            f"the engine failed while computing this request: {type(error).__name__}"
        )
        return [
            self.scheduler.finish(seq, "error", error=fault) for seq in list(self.scheduler.running)
        ]

    def check_idle(self) -> None:
        """When nothing runs or waits: raises AssertionError unless all blocks came back. O(1)."""
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
