"""One request as the engine runs it: its tokens, its place in the KV cache, its text so far."""

from __future__ import annotations

import secrets
import time
from array import array
from concurrent.futures import Future
from typing import TYPE_CHECKING

from models.engine.block_pool import Prefix
from models.engine.messages import GenerationRequest, PromptToken, Timing, Usage
from models.engine.output_text import Decodes, OutputText

if TYPE_CHECKING:
    from torch import Tensor

    from models.engine.guidance import Matcher


IN_FLIGHT = -2
"""In place of a token whose sampling has been started and not been fetched yet. No picture's."""


class Sequence:
    """Mutable state of one request inside the engine. Only the engine's thread touches it.

    token_ids:   [ prompt, pictures as IMAGE_TOKEN_ID | output ]
                   ^0            ^num_computed          ^len
                 in the KV cache | to be computed
                 or on its way

    A token that is being sampled is there already, as IN_FLIGHT, and counts for what comes next.
    """

    def __init__(
        self, request: GenerationRequest, tokenizer: Decodes, block_size: int, max_len: int
    ) -> None:
        self.request_id = request.request_id
        self.params = request.params
        self.images = request.images
        self.deadline = request.deadline
        self.token_ids = array("q", request.token_ids)
        self.num_prompt_tokens = len(request.token_ids)
        self.max_len = min(max_len, self.num_prompt_tokens + request.params.max_new_tokens)
        self.num_computed = 0
        self.in_flight = False
        """Whether the last of `token_ids` is still IN_FLIGHT."""
        self.ended = False
        self.num_cached = 0
        """Prompt tokens that the prefix cache held when the request was first admitted."""
        self.block_table = array("q")  # its bytes become a tensor's as they are
        self.num_known_blocks = 0
        self.prefix = Prefix(block_size, request.images)
        self.text = OutputText(tokenizer, request.params.stop, request.params.min_tokens)
        self.seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        self.image_embeddings: dict[int, Tensor] = {}
        """Projected embeddings by index of `images`, held while the prefill still needs them."""
        self.num_scored = 0
        """Of the prompt's tokens, how many have been found how likely, where that is asked for."""
        self._scores: list[PromptToken] = []
        self.guide: Future[Matcher] | None = None
        """What the answer must follow, once it has been compiled; until then it waits."""
        self.arrived_at = request.arrived_at
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """That are known, pictures' positions among them."""
        return len(self.token_ids) - self.in_flight

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def has_last_in_flight(self) -> bool:
        """Whether it may have no token after the one that is being sampled."""
        return self.in_flight and len(self.token_ids) >= self.max_len

    @property
    def num_sparable(self) -> int:
        """How many tokens from the first one on need not be computed if the cache holds them. The
        last one's logits choose the next token, and the one before tells how likely a token was.
        """
        if self.params.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens:
            return max(0, self.num_scored - 1)
        return len(self.token_ids) - 1

    @property
    def is_ready(self) -> bool:
        """Whether it could run, or be told why it never will."""
        return self.guide is None or self.guide.done()

    @property
    def matcher(self) -> Matcher | None:
        """Of a sequence that runs."""
        return None if self.guide is None else self.guide.result()

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_output_tokens, self.num_cached)

    @property
    def timing(self) -> Timing:
        return Timing(
            self.arrived_at, self.queued_at, self.started_at,
            self.first_token_at, self.last_token_at,
        )  # fmt: skip

    def take_off(self) -> None:
        """Its next token is being sampled."""
        self.token_ids.append(IN_FLIGHT)
        self.in_flight = True

    def land(self) -> None:
        """The sampling is over: the place is free for the token that has come, or for none."""
        if self.in_flight:
            self.token_ids.pop()
            self.in_flight = False

    def add_scores(self, scores: list[PromptToken]) -> None:
        self._scores += scores
        self.num_scored += len(scores)

    def take_scores(self) -> tuple[PromptToken, ...]:
        """What has been added since the last time."""
        taken, self._scores = tuple(self._scores), []
        return taken

    def forget_computed(self) -> None:
        """Back to nothing computed: its blocks have been given back."""
        self.num_computed = 0
        self.num_known_blocks = 0
        self.block_table = array("q")
        self.image_embeddings.clear()
