"""A caller's prompt and pictures -> a GenerationRequest that the engine can run as it is.

Everything that can be wrong with a request is found here, before it is queued; and all that is
slow about it (tokenising, resizing) happens here, in the caller's or a pool's thread, off the
event loop and off the engine's thread.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL.Image import Image

from models.checkpoints import ModelSpec
from models.engine.messages import GenerationRequest, ImageSpan
from models.engine.sampling_params import SamplingParams
from models.errors import InvalidRequest
from models.prompts import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, Tokenizer, tokenize_prompt
from models.vision import ImagePreprocessor, PreparedImage

Prompt: TypeAlias = "str | Sequence[int]"
"""Text, one `<image>` for each picture; or, without pictures, token ids, to which nothing is
added."""


@dataclass(frozen=True)
class RequestPreparer:
    """Safe to call from several threads at once.

    Attributes:
        max_model_len: prompt and answer together, in tokens.
        tinychat_prompt_rewrite: put TinyChat's backslash, "n" and space behind each picture.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    preprocessor: ImagePreprocessor
    max_model_len: int
    tinychat_prompt_rewrite: bool = False

    def prepare(
        self,
        prompt: Prompt,
        images: Sequence[Image],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        queue_timeout_s: float | None = None,
        arrived_at: float | None = None,
    ) -> GenerationRequest:
        """
        Args:
            arrived_at: `time.monotonic()` at which it was asked for; default: now.

        Raises:
            InvalidRequest: the prompt is neither text nor token ids, does not fit into the
                context, or does not have as many placeholders as there are pictures; a picture
                cannot be decoded; a token of the prompt's, a stop token, or one with a bias, is
                not in the vocabulary.
        """
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        self.check_tokens("stop_token_ids", params.stop_token_ids)
        self.check_tokens("logit_bias", (token for token, _ in params.biases))
        # Counting comes first: a wrong request should not cost the preprocessing.
        tokens = self._tokens(prompt, len(images))
        self._check_vocabulary(tokens)
        self._check_length(len(tokens) + len(images) * (self.preprocessor.min_tokens - 1))
        token_ids, spans = self._lay_out(tokens, images)
        self._check_length(len(token_ids))
        return GenerationRequest(
            request_id=request_id or uuid.uuid4().hex,
            token_ids=token_ids,
            images=spans,
            params=params,
            deadline=None if queue_timeout_s is None else time.monotonic() + queue_timeout_s,
            arrived_at=arrived_at,
        )

    def count_tokens(self, prompt: str) -> int:
        """Of a prompt, each placeholder with the fewest tokens that a picture can have."""
        num_images = prompt.count(IMAGE_PLACEHOLDER)
        tokens = self._tokens(prompt, num_images)
        return len(tokens) + num_images * (self.preprocessor.min_tokens - 1)

    def check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        """
        Raises:
            InvalidRequest: one of them is not in the vocabulary.
        """
        size = self.tokenizer.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise InvalidRequest(
                    field, f"{token} is outside of the vocabulary of {size} tokens"
                )

    def _tokens(self, prompt: Prompt, num_images: int) -> list[int]:
        """With one IMAGE_TOKEN_ID for each picture."""
        if not isinstance(prompt, str):
            return self._given_tokens(prompt, num_images)
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InvalidRequest("prompt", "holds half of a surrogate pair, which is no character")
        return tokenize_prompt(
            prompt,
            self.tokenizer,
            num_images=num_images,
            prompt_spec=self.spec.prompt,
            tinychat_prompt_rewrite=self.tinychat_prompt_rewrite,
        )

    def _given_tokens(self, prompt: object, num_images: int) -> list[int]:
        if not isinstance(prompt, (list, tuple)) or not all(type(i) is int for i in prompt):
            raise InvalidRequest(
                "prompt", f"is {type(prompt).__name__}; it must be a string or a list of token ids"
            )
        if num_images:
            raise InvalidRequest("prompt", "is of token ids; one about pictures must be text")
        self.check_tokens("prompt", prompt)
        return list(prompt)

    def _lay_out(
        self, tokens: list[int], images: Sequence[Image]
    ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Each placeholder becomes as many positions as its picture has tokens."""
        remaining = iter(images)
        token_ids: list[int] = []
        spans: list[ImageSpan] = []
        for token in tokens:
            if token == IMAGE_TOKEN_ID:
                prepared = self._prepare_image(next(remaining), number=len(spans) + 1)
                spans.append(ImageSpan(len(token_ids), prepared))
                token_ids += [IMAGE_TOKEN_ID] * prepared.num_tokens
            else:
                token_ids.append(token)
        return token_ids, tuple(spans)

    def _prepare_image(self, image: Image, number: int) -> PreparedImage:
        if not isinstance(image, Image):
            raise InvalidRequest(
                "images", f"number {number} is {type(image).__name__}; it must be a PIL image"
            )
        try:
            return self.preprocessor(image)
        except Exception as error:  # PIL decodes only now, and raises nearly any type
            raise InvalidRequest("images", f"number {number} cannot be decoded") from error

    def _check_vocabulary(self, tokens: list[int]) -> None:
        """A tokenizer may have tokens for other media, which the model has no embeddings for."""
        largest = max(tokens, default=0)
        if largest >= self.spec.language.vocab_size:
            raise InvalidRequest(
                "prompt",
                f"holds the token {self.tokenizer.decode([largest], skip_special_tokens=False)!r}, "
                "which this model cannot read",
            )

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise InvalidRequest("prompt", "is empty; it must hold at least one token")
        if num_tokens >= self.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"has {num_tokens} tokens, pictures included, but prompt and answer together "
                f"must fit into the context of {self.max_model_len}; shorten it",
            )
