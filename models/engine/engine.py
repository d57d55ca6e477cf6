"""The engine as its callers see it, and the one thread that runs every step.

callers (any thread, any event loop)            engine thread
------------------------------------            -------------
prepare() in a pool ──GenerationRequest──┐
cancel / abort() ─────────────Abort──────┴─> inbox ─> core.add / core.abort
                                                      core.step()
iterator <── queue <── GenerationDelta ──────────────  deliver: one wake-up per loop and step
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import torch
from PIL.Image import Image

from models.checkpoints import ModelSpec
from models.engine.core import EngineCore
from models.engine.mailbox import Mailbox, ring_all
from models.engine.messages import Abort, EngineStats, GenerationDelta, GenerationRequest, Usage
from models.engine.preparation import RequestPreparer
from models.engine.sampling_params import SamplingParams
from models.errors import EngineDead, InvalidRequest
from models.prompts import Template

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps that fail in a row before the engine gives up: by then the device itself is broken."""
PREPARE_THREADS = 4
DEFAULT_PARAMS = SamplingParams()


Subscriber: TypeAlias = "Mailbox | queue.SimpleQueue[GenerationDelta]"
"""Where one request's deltas go: to a coroutine, or to a thread."""


class Engine:
    """A loaded model that answers many requests at once. Build it with `models.load_engine`."""

    def __init__(
        self,
        core: EngineCore,
        preparer: RequestPreparer,
        template: Template,
        *,
        num_threads: int,
        description: dict[str, str],
    ) -> None:
        self._core = core
        self._preparer = preparer
        self.template = template
        """The model's conversation template. Prompts come finished; their senders may use it."""
        self._num_threads = num_threads
        self._description = description
        self._pool = ThreadPoolExecutor(
            min(PREPARE_THREADS, os.cpu_count() or 1), thread_name_prefix="prepare"
        )
        self._inbox: deque[GenerationRequest | Abort] = deque()
        self._wake = threading.Event()
        self._subscribers: dict[str, Subscriber] = {}
        self._lock = threading.Lock()  # guards _subscribers and _stopped against each other
        self._stopped: EngineDead | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- what callers use -------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        return self._preparer.spec

    @property
    def context_length(self) -> int:
        """Prompt and answer together, in tokens."""
        return self._preparer.max_model_len

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The model's own: any of them ends an answer."""
        return self._core.scheduler.eos_token_ids

    def count_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, each "<image>" with all the positions of a picture."""
        return self._preparer.count_tokens(prompt)

    def description(self) -> dict[str, str]:
        """What is loaded, where and how, for start-up lines."""
        return dict(self._description)

    async def stream(
        self,
        prompt: str,
        images: Sequence[Image] = (),
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
        queue_timeout_s: float | None = None,
        min_interval_s: float = 0.0,
    ) -> AsyncGenerator[GenerationDelta, None]:
        """Yields the answer's deltas as they are computed.

        Closing or cancelling the iterator aborts the request and frees all that it holds.

        Args:
            prompt: the text as a client sends it, one "<image>" for each of `images`.
            queue_timeout_s: how long it may wait for its turn.
            min_interval_s: between two deltas; what comes faster is merged. Whoever wants only so
                many a second should say so here: each delta costs the event loop a wake-up.

        Raises:
            InvalidRequest: before anything was queued.
            RequestTimeout: it waited longer than `queue_timeout_s`.
            RequestAborted: `abort` was called with its id.
            EngineFault, EngineDead: the engine failed on it, or has stopped.
        """
        self.check_health()
        loop = asyncio.get_running_loop()
        prepare = partial(
            self._preparer.prepare,
            prompt, images, params, request_id=request_id, queue_timeout_s=queue_timeout_s,
        )  # fmt: skip
        del images  # decoded, they may be large; they are not to be held until the answer's end
        request = await loop.run_in_executor(self._pool, prepare)
        del prepare
        if params.max_new_tokens == 0:
            yield _nothing_to_generate(request)
            return
        mailbox = Mailbox(loop)
        self._submit(request, mailbox)
        finished = False
        try:
            while not finished:
                delta = await mailbox.take()
                finished = delta.finish_reason is not None
                yield _or_raise(delta)
                await mailbox.rest(min_interval_s)
        finally:
            if not finished:
                self.abort(request.request_id)

    def generate(
        self,
        prompt: str,
        images: Sequence[Image] = (),
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
    ) -> Iterator[GenerationDelta]:
        """`stream` for callers without an event loop; blocks between deltas."""
        request = self._preparer.prepare(prompt, images, params, request_id=request_id)
        if params.max_new_tokens == 0:
            yield _nothing_to_generate(request)
            return
        deltas: queue.SimpleQueue[GenerationDelta] = queue.SimpleQueue()
        self._submit(request, deltas)
        finished = False
        try:
            while not finished:
                delta = deltas.get()
                finished = delta.finish_reason is not None
                yield _or_raise(delta)
        finally:
            if not finished:
                self.abort(request.request_id)

    def generate_batch(
        self,
        prompts: Sequence[tuple[str, Sequence[Image]]],
        params: SamplingParams = DEFAULT_PARAMS,
    ) -> list[str]:
        """The answers to many (prompt, pictures) at once, in order; blocks until all are there."""
        texts = [""] * len(prompts)
        index_of: dict[str, int] = {}
        deltas: queue.SimpleQueue[GenerationDelta] = queue.SimpleQueue()
        try:
            for index, (prompt, images) in enumerate(prompts):
                request = self._preparer.prepare(prompt, images, params)
                if params.max_new_tokens > 0:
                    index_of[request.request_id] = index
                    self._submit(request, deltas)
            while index_of:
                delta = _or_raise(deltas.get())
                texts[index_of[delta.request_id]] += delta.text
                if delta.finish_reason is not None:
                    del index_of[delta.request_id]
        finally:
            for request_id in index_of:
                self.abort(request_id)
        return texts

    def abort(self, request_id: str) -> None:
        """Takes a request back between two steps; harmless if it has ended or is unknown."""
        self._inbox.append(Abort(request_id))
        self._wake.set()

    def stats(self) -> EngineStats:
        """A snapshot from another thread: each figure right, together perhaps a step apart."""
        return self._core.stats(dead=self._stopped is not None)

    def check_health(self) -> None:
        """Raises EngineDead if the engine's thread no longer runs."""
        if self._stopped is not None:
            raise _again(self._stopped)
        if not self._thread.is_alive():
            raise EngineDead("the engine's thread has died")

    def close(self) -> None:
        """Ends what runs and waits, and stops the thread. May be called more than once."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        # What is being prepared goes on, and is then refused: a cancelled future would reach its
        # caller as the cancellation of the caller's own task.
        self._pool.shutdown(wait=False)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the boundary -----------------------------------------------------------------------

    def _submit(self, request: GenerationRequest, subscriber: Subscriber) -> None:
        with self._lock:
            if self._stopped is not None:
                raise _again(self._stopped)
            if request.request_id in self._subscribers:
                raise InvalidRequest("request_id", f"{request.request_id!r} is in use already")
            self._subscribers[request.request_id] = subscriber
        self._inbox.append(request)
        self._wake.set()

    def _deliver(self, deltas: list[GenerationDelta]) -> None:
        """Hands each delta to its request's reader; at most one wake-up per event loop and step."""
        to_wake: dict[asyncio.AbstractEventLoop, list[Mailbox]] = defaultdict(list)
        for delta in deltas:
            ended = delta.finish_reason is not None
            with self._lock:
                subscriber = (
                    self._subscribers.pop(delta.request_id, None)
                    if ended
                    else self._subscribers.get(delta.request_id)
                )
            if isinstance(subscriber, queue.SimpleQueue):
                subscriber.put(delta)
            elif subscriber is not None and subscriber.loop.is_closed():  # its reader is gone
                self.abort(delta.request_id)
            elif subscriber is not None and subscriber.put(delta):
                to_wake[subscriber.loop].append(subscriber)
        for loop, mailboxes in to_wake.items():
            with suppress(RuntimeError):  # closed in this moment; the next delta will find it so
                loop.call_soon_threadsafe(ring_all, mailboxes)

    # ---- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        stopped = EngineDead("the engine has been closed")
        failed_steps = 0
        try:
            while not self._closing:
                self._deliver(self._read_inbox())
                if not self._core.has_work:
                    self._core.check_idle()
                    self._wake.wait()
                    self._wake.clear()
                    continue
                try:
                    self._deliver(self._core.step())
                    failed_steps = 0
                except Exception as error:
                    failed_steps += 1
                    logger.exception("an engine step failed (%d in a row)", failed_steps)
                    self._deliver(self._core.fail_running(error))
                    if failed_steps >= MAX_FAILED_STEPS:
                        raise
        except BaseException as error:
            logger.exception("the engine's thread has died")
            stopped = EngineDead(f"the engine has died of {type(error).__name__}")
        finally:
            self._stop(stopped)

    def _read_inbox(self) -> list[GenerationDelta]:
        deltas: list[GenerationDelta] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Abort):
                deltas += self._core.abort(message.request_id)
            else:
                self._core.add(message)
        return deltas

    def _stop(self, reason: EngineDead) -> None:
        """Refuses new requests and ends the others; nobody is left waiting for an answer."""
        with self._lock:
            self._stopped = reason
            left = list(self._subscribers)
        scheduler = self._core.scheduler
        for seq in (*scheduler.running, *scheduler.waiting):
            scheduler.finish(seq, "error", error=reason)
        self._deliver([GenerationDelta(r, finish_reason="error", error=reason) for r in left])


def _again(reason: EngineDead) -> EngineDead:
    """A copy to raise: an exception that is raised again and again keeps every caller's frame."""
    return EngineDead(*reason.args)


def _or_raise(delta: GenerationDelta) -> GenerationDelta:
    if delta.error is not None:
        raise delta.error
    return delta


def _nothing_to_generate(request: GenerationRequest) -> GenerationDelta:
    usage = Usage(prompt_tokens=len(request.token_ids))
    return GenerationDelta(request.request_id, finish_reason="length", usage=usage)
