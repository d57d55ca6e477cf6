"""What crosses the boundary between the callers' side and the engine's thread.

Every message can be pickled, so that the engine can move into a process of its own behind the
same interface.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from models.engine.sampling_params import SamplingParams
from models.errors import TinyChatError

if TYPE_CHECKING:
    from models.checkpoints import ModelSpec
    from models.vision.preprocessing import ImagePreprocessor, PreparedImage

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class ImageSpan:
    """Where one picture's embeddings stand in the prompt: `image.num_tokens` positions long."""

    start: int
    image: PreparedImage

    @property
    def end(self) -> int:
        return self.start + self.image.num_tokens


@dataclass(frozen=True)
class GenerationRequest:
    """One prepared request: tokenised, preprocessed and checked against the model's limits.

    Attributes:
        token_ids: the prompt; positions inside an `ImageSpan` hold IMAGE_TOKEN_ID.
        images: the spans, in order, not overlapping.
        deadline: `time.monotonic()` by which it must have left the waiting line, or None.
        arrived_at: `time.monotonic()` at which it was asked for, unprepared.
        min_interval_s: how often deltas are wanted at most; see `Outbox`. 0 is one for each step.
    """

    request_id: str
    token_ids: list[int]
    images: tuple[ImageSpan, ...]
    params: SamplingParams
    deadline: float | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    min_interval_s: float = 0.0


@dataclass(frozen=True)
class Abort:
    """Take a request back, wherever it is: waiting, in prefill, in decode."""

    request_id: str


@dataclass(frozen=True)
class Usage:
    """Token counts of one request. Pictures count with every position that they occupy."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timing:
    """When one request came how far, by `time.monotonic()`, which a machine's processes share.

    Attributes:
        arrived: it was asked for; its pictures were not decoded, its text not tokenised yet.
        queued: the engine had it.
        started: it left the waiting line for the first time.
        first_token, last_token: were computed.
    """

    arrived: float
    queued: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class FinishedRequest(NamedTuple):
    """What there is to say about a request that has ended.

    Attributes:
        timing: None where the engine itself has ended.
    """

    reason: FinishReason
    usage: Usage
    timing: Timing | None


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely one token of an answer was.

    Attributes:
        top: the likeliest tokens and their log-probabilities, likeliest first; as many as were
            asked for, fewer where a guide allowed fewer.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptToken:
    """One position of a prompt, and how likely its token was after those before it.

    Attributes:
        token_id: None inside of a picture.
        logprob: None for the first position, too, which comes after nothing.
        rank: 1 for the likeliest token, and so on; None where `logprob` is.
        top: as in TokenLogprobs.
    """

    token_id: int | None = None
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationDelta:
    """What one request gained in one step, or in several.

    Attributes:
        text: the new text; all deltas' texts joined are the answer, and none is ever taken back.
        token_ids: the new tokens, the one that ended the answer included.
        finish_reason: set in the last delta only.
        error: why `finish_reason` is "error" (or "abort").
        logprobs: of each of `token_ids`, where the request asked for them.
        stop_reason: the request's stop string, or the one of its `stop_token_ids`, that ended the
            answer; None where the model's own end did.
        timing: in the delta with the first token, and in the last one.
        prompt_logprobs: of all positions of the prompt, where the request asked for them; in the
            delta with the first token, or in the only one.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    error: TinyChatError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None
    timing: Timing | None = None
    prompt_logprobs: tuple[PromptToken, ...] = ()


@dataclass(frozen=True)
class ServedModel:
    """What the callers' side must know of the model that a host has loaded.

    Attributes:
        max_model_len: prompt and answer together, in tokens.
        stop_token_ids: the model's own; any of them ends an answer.
        description: what is loaded, where and how, for start-up lines.
    """

    spec: ModelSpec
    preprocessor: ImagePreprocessor
    max_model_len: int
    stop_token_ids: frozenset[int]
    description: dict[str, str]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of what the engine holds; blocks_free + blocks_cached + blocks_used is total.

    Attributes:
        num_prompt_tokens: of all requests that have had their first token, cached ones included.
        num_generated_tokens: of all requests.
        prefix_query_tokens, prefix_hit_tokens: of all prompts; of these, what the cache held.
        image_queries, image_hits: pictures whose embeddings a prompt needed; of these, the kept.
        token_gaps: how often requests waited how long for their next token; see `TokenGaps`.
    """

    num_running: int
    num_waiting: int
    max_num_seqs: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    block_size: int
    image_cache_bytes: int
    num_preemptions: int
    num_steps: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    dead: bool = False
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    image_queries: int = 0
    image_hits: int = 0
    token_gaps: tuple[int, ...] = ()
