"""The engine as its callers see it, from any thread and any event loop.

prepare() in a pool ──GenerationRequest──┐
cancel / abort() ─────────────Abort──────┴─> host, where the steps run
iterator <── mailbox <── GenerationDelta ─── _deliver: one wake-up per event loop and message
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from PIL.Image import Image

from models.checkpoints import ModelSpec
from models.engine.host import EngineHost
from models.engine.mailbox import Mailbox, ring_all
from models.engine.messages import (
    Abort,
    EngineStats,
    FinishedRequest,
    GenerationDelta,
    GenerationRequest,
    Usage,
)
from models.engine.preparation import Prompt, RequestPreparer
from models.engine.sampling_params import SamplingParams
from models.errors import EngineDead, InvalidRequest
from models.prompts import Template, Tokenizer

PREPARE_THREADS = 4
DEFAULT_PARAMS = SamplingParams()
MAX_FINISHED = 10_000
"""Ended requests that are remembered for `take_finished`, should nobody call it."""

Subscriber: TypeAlias = "Mailbox | queue.SimpleQueue[GenerationDelta]"
"""Where one request's deltas go: to a coroutine, or to a thread."""
Images: TypeAlias = Sequence[Image] | Callable[[], Sequence[Image]]


class Engine:
    """A loaded model that answers many requests at once. Build it with `models.load_engine`."""

    def __init__(
        self,
        host: EngineHost,
        preparer: RequestPreparer,
        template: Template,
        *,
        stop_token_ids: frozenset[int],
        description: dict[str, str],
    ) -> None:
        self._host = host
        self._preparer = preparer
        self._stop_token_ids = stop_token_ids
        self.template = template
        """The model's conversation template. Prompts come finished; their senders may use it."""
        self._description = description
        self._pool = ThreadPoolExecutor(
            min(PREPARE_THREADS, os.cpu_count() or 1), thread_name_prefix="prepare"
        )
        self._subscribers: dict[str, Subscriber] = {}
        self._lock = threading.Lock()  # guards _subscribers and _stopped against each other
        self._stopped: EngineDead | None = None
        self._finished: deque[FinishedRequest] = deque(maxlen=MAX_FINISHED)
        host.start(self._deliver, self._stop)

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
        return self._stop_token_ids

    def count_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, each "<image>" with all the positions of a picture."""
        return self._preparer.count_tokens(prompt)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own, for reading only; safe to use from several threads at once."""
        return self._preparer.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without pictures, with the beginning-of-sequence token where the
        model has one."""
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(token_ids)

    def check_tokens(self, field: str, token_ids: Iterable[int]) -> None:
        """Raises InvalidRequest, about this field, if one of them is not in the vocabulary."""
        self._preparer.check_tokens(field, token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text; of a special token, its name."""
        return self.tokenizer.token_bytes(token_id) or self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for bytes that make no character by themselves."""
        text = self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return text or self.tokenizer.decode([token_id], skip_special_tokens=False)

    def description(self) -> dict[str, str]:
        """What is loaded, where and how, for start-up lines."""
        return dict(self._description)

    async def stream(
        self,
        prompt: Prompt,
        images: Images = (),
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
        queue_timeout_s: float | None = None,
        min_interval_s: float = 0.0,
    ) -> AsyncGenerator[GenerationDelta, None]:
        """Yields the answer's deltas as they are computed.

        Closing or cancelling the iterator aborts the request and frees all that it holds.

        Args:
            prompt: the text as a client sends it, one "<image>" for each of `images`; or, where
                there are none, token ids.
            images: or a function that returns them, decoded or not. It is called, as everything
                that is slow about a request is done, in one of the engine's own threads.
            queue_timeout_s: how long it may wait for its turn.
            min_interval_s: between two deltas, on average; what comes faster is merged where it
                arises. Whoever wants only so many a second should say so here: each delta costs a
                message and a wake-up of the event loop.

        Raises:
            InvalidRequest: before anything was queued.
            RequestTimeout: it waited longer than `queue_timeout_s`.
            RequestAborted: `abort` was called with its id.
            EngineFault, EngineDead: the engine failed on it, or has stopped.
        """
        self.check_health()
        loop = asyncio.get_running_loop()
        prepare = partial(
            self._prepare,
            prompt, images, params, request_id=request_id, queue_timeout_s=queue_timeout_s,
            arrived_at=time.monotonic(),
        )  # fmt: skip
        del images  # decoded, they may be large; they are not to be held until the answer's end
        request = await loop.run_in_executor(self._pool, prepare)
        del prepare
        if params.needs_nothing:
            yield _nothing_to_generate(request)
            return
        mailbox = Mailbox(loop)
        self._submit(replace(request, min_interval_s=min_interval_s), mailbox)
        request_id = request.request_id
        del request  # with its pictures, as the engine takes them
        finished = False
        try:
            while not finished:
                delta = await mailbox.take()
                finished = delta.finish_reason is not None
                yield _or_raise(delta)
        finally:
            if not finished:
                self.abort(request_id)

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[Image] = (),
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
    ) -> Iterator[GenerationDelta]:
        """`stream` for callers without an event loop; blocks between deltas."""
        request = self._preparer.prepare(prompt, images, params, request_id=request_id)
        if params.needs_nothing:
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
                if not params.needs_nothing:
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
        self._host.post(Abort(request_id))

    def stats(self) -> EngineStats:
        """A snapshot from another thread: each figure right, together perhaps a step apart."""
        return replace(self._host.stats(), dead=self._stopped is not None)

    def take_finished(self) -> list[FinishedRequest]:
        """The requests that have ended since the last call, for whoever keeps statistics."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def check_health(self) -> None:
        """Raises EngineDead if the engine can answer no more."""
        if self._stopped is not None:
            raise _again(self._stopped)
        if not self._host.is_alive():
            raise EngineDead("the engine has died")

    def close(self) -> None:
        """Ends what runs and waits. May be called more than once."""
        self._host.close()
        # What is being prepared goes on, and is then refused: a cancelled future would reach its
        # caller as the cancellation of the caller's own task.
        self._pool.shutdown(wait=False)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the boundary -----------------------------------------------------------------------

    def _prepare(
        self, prompt: Prompt, images: Images, params: SamplingParams, **options: Any
    ) -> GenerationRequest:
        pictures = images() if callable(images) else images
        return self._preparer.prepare(prompt, pictures, params, **options)

    def _submit(self, request: GenerationRequest, subscriber: Subscriber) -> None:
        with self._lock:
            if self._stopped is not None:
                raise _again(self._stopped)
            if request.request_id in self._subscribers:
                raise InvalidRequest("request_id", f"{request.request_id!r} is in use already")
            self._subscribers[request.request_id] = subscriber
        self._host.post(request)

    def _deliver(self, deltas: list[GenerationDelta]) -> None:
        """Hands each delta to its request's reader; at most one wake-up per event loop."""
        to_wake: dict[asyncio.AbstractEventLoop, list[Mailbox]] = defaultdict(list)
        for delta in deltas:
            ended = delta.finish_reason is not None
            with self._lock:
                subscriber = (
                    self._subscribers.pop(delta.request_id, None)
                    if ended
                    else self._subscribers.get(delta.request_id)
                )
            if subscriber is not None and delta.finish_reason is not None:
                self._finished.append(
                    FinishedRequest(delta.finish_reason, delta.usage, delta.timing)
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

    def _stop(self, reason: EngineDead) -> None:
        """Refuses new requests and ends the others; nobody is left waiting for an answer."""
        with self._lock:
            self._stopped = reason
            left = list(self._subscribers)
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
