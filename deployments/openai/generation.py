"""One request of the OpenAI routes on its way through door, pictures, engine and pacing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from deployments.config import AppConfig
from deployments.door import Door
from deployments.image_fetcher import ImageFetcher, is_web_url
from deployments.media import ImageLimits, decode_images
from deployments.openai.answer import Answer, Choice, usage_of
from deployments.openai.merging import merged
from deployments.openai.messages import Picture
from deployments.openai.request import Options
from deployments.pacing import Update, paced
from deployments.request_log import current_entry
from models import SamplingParams, Usage
from models.errors import InvalidRequest

if TYPE_CHECKING:
    from models import Engine, Prompt

WHOLE_INTERVAL_S = 1.0
"""Between two updates of an answer that nobody sees before it is complete."""
PATIENT_SIGNS = 2
"""So many signs of life does a streamed answer wait for its first token before it begins, so that
what fails until then has a status of its own."""


@dataclass(frozen=True)
class Backend:
    """What all generations share."""

    config: AppConfig
    engine: Engine
    door: Door
    image_limits: ImageLimits
    fetcher: ImageFetcher


class Generation:
    """A checked request. Nothing is held, queued or fetched before it is iterated over."""

    def __init__(
        self,
        backend: Backend,
        options: Options,
        answer: Answer,
        prompts: Sequence[Prompt],
        pictures: Sequence[Picture] = (),
        template_stops: Sequence[str] = (),
    ) -> None:
        """
        Args:
            pictures: of the one prompt that may have them.
            template_stops: what ends an answer besides `options.params.stop`.
        """
        self.options = options
        self._backend = backend
        self._answer = answer
        self._prompts = prompts
        self._pictures = pictures
        self._template_stops = tuple(s for s in template_stops if s not in options.params.stop)

    @property
    def num_choices(self) -> int:
        return len(self._prompts) * self.options.n

    async def whole(self) -> dict[str, Any]:
        """The answer as one object.

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        choices = [Choice() for _ in range(self.num_choices)]
        async with aclosing(self.updates(WHOLE_INTERVAL_S)) as updates:
            async for index, update in updates:
                choices[index].add(update)
        used = usage_of([choice.usage for choice in choices], self.options.n)
        if self.options.params.prompt_logprobs is None:
            return self._answer.whole(choices, used)
        # Thousands of tokens, each with others beside it.
        return await asyncio.to_thread(self._answer.whole, choices, used)

    async def chunks(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The answer in pieces; None is a sign of life.

        The first one comes with the first token, or where that is long in coming.

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        clock = asyncio.get_running_loop().time
        usages = [Usage()] * self.num_choices
        begun = False
        interval_s = 1 / self._backend.config.max_records_per_s
        async with aclosing(self.updates(interval_s)) as updates:
            patience_ends = clock() + PATIENT_SIGNS * self._backend.config.sign_of_life_s
            async for index, update in updates:
                if not begun and not update.has_news and clock() < patience_ends:
                    continue
                if not begun:
                    begun = True
                    usages[index] = replace(update.usage, completion_tokens=0)
                    for chunk in self._answer.first_chunks(self.num_choices):
                        yield self._with_usage(chunk, usages)
                usages[index] = update.usage
                if update.has_news:
                    write = self._answer.chunk
                    if update.prompt_logprobs:  # thousands of them, perhaps
                        chunk = await asyncio.to_thread(write, index, update)
                    else:
                        chunk = write(index, update)
                    yield self._with_usage(chunk, usages)
                else:
                    yield None
        if self.options.include_usage:
            yield self._answer.usage_chunk(usage_of(usages, self.options.n))

    async def updates(self, interval_s: float) -> AsyncGenerator[tuple[int, Update], None]:
        """Which choice, and what is new in it. Holds the request's places meanwhile.

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        with self._backend.door.enter(self.num_choices):
            for prompt in self._prompts:
                current_entry().add_prompt(prompt, len(self._pictures))
            images = await self._images()
            streams = [self._start(index, images, interval_s) for index in range(self.num_choices)]
            del images  # each stream lets go of them once it has prepared its own
            try:
                async with aclosing(merged(streams)) as updates:
                    del streams
                    async for index, update in updates:
                        if update.stop_reason in self._template_stops:
                            update.stop_reason = None  # the request did not ask for it
                        yield index, update
            except InvalidRequest as error:
                guide = self.options.params.guide
                if guide is None or error.field != guide.field:
                    raise
                raise InvalidRequest(self.options.guide_field, error.problem) from None

    async def _images(self) -> Any:
        """As the engine takes them: a function that decodes them, or, for several choices, what it
        would return, decoded once."""
        if not self._pictures:
            return ()
        web = [p for p in self._pictures if is_web_url(p.source)]
        sources: list[str | bytes] = [picture.source for picture in self._pictures]
        if self._backend.config.allowed_image_hosts:
            files = await self._backend.fetcher.fetch([(p.field, str(p.source)) for p in web])
            remaining = iter(files)
            sources = [next(remaining) if is_web_url(s) else s for s in sources]
        decode = partial(
            decode_images, sources, self._backend.image_limits, [p.field for p in self._pictures]
        )
        self._pictures = ()  # megabytes of base64, not to be held until the answer's end
        if self.num_choices == 1:
            return decode
        images: list[Image.Image] = await asyncio.get_running_loop().run_in_executor(None, decode)
        return images

    def _start(self, index: int, images: Any, interval_s: float) -> AsyncGenerator[Update, None]:
        config = self._backend.config
        deltas = self._backend.engine.stream(
            self._prompts[index // self.options.n],
            images,
            self._params(index % self.options.n),
            queue_timeout_s=config.queue_timeout_s,
            min_interval_s=interval_s,
        )
        deltas = current_entry().watched(deltas, counts_prompt=index % self.options.n == 0)
        return paced(deltas, sign_of_life_s=config.sign_of_life_s)

    def _params(self, number: int) -> SamplingParams:
        """Of a prompt's choice: each has a seed of its own, or all would be the same."""
        params = self.options.params
        stops = () if params.ignore_eos else self._template_stops
        seed = params.seed
        if seed is not None:
            seed = (seed + number + (1 << 63)) % (1 << 64) - (1 << 63)
        scored = params.prompt_logprobs
        if number and self._answer.scores_prompts_once:
            scored = None
        return replace(params, seed=seed, stop=(*params.stop, *stops), prompt_logprobs=scored)

    def _with_usage(self, chunk: dict[str, Any], usages: Sequence[Usage]) -> dict[str, Any]:
        if self.options.continuous_usage:
            return {**chunk, "usage": usage_of(usages, self.options.n)}
        return {**chunk, "usage": None} if self.options.include_usage else chunk
