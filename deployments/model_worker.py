"""ModelWorker: an engine and a door, and the worker protocol's four methods on top of them.

Nothing here knows of Ray; `replica.py` puts it there. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from deployments.config import AppConfig
from deployments.door import Door
from deployments.load_board import ApplicationLoad
from deployments.media import ImageLimits, decode_images
from deployments.openai.service import OpenAIService
from deployments.pacing import paced
from deployments.records import error_record, frame, text_record
from deployments.request_log import RequestLog, current_entry
from deployments.worker_request import IMAGE_PLACEHOLDER, RequestLimits, WorkerRequest
from models import GenerationDelta, Usage
from models.errors import EngineFault
from models.prompts.templates import Template

if TYPE_CHECKING:
    from models import Engine

logger = logging.getLogger("ray.serve")

PROMPT_CHARS_PER_TOKEN = 64
"""No tokeniser packs more into a token on average; longer prompts are refused untokenised."""


class ModelWorker:
    """Answers requests with one engine. The names of its methods are the upstream worker's."""

    def __init__(self, config: AppConfig, model_name: str, engine: Engine, door: Door) -> None:
        """
        Args:
            model_name: as registered, `-4bit-AWQ` included.
        """
        self.config = config
        self.model_name = model_name
        self.engine = engine
        self.door = door
        self.requests = RequestLog(keeps_content=config.log_content)
        """Of what comes over HTTP, and of a replica's calls through handles."""
        self._limits = RequestLimits(
            default_max_new_tokens=config.default_max_new_tokens,
            max_new_tokens_cap=config.max_new_tokens_cap,
            max_images=config.max_images,
            max_prompt_chars=PROMPT_CHARS_PER_TOKEN * engine.context_length,
        )
        self._image_limits = ImageLimits(
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            max_side=config.max_image_side,
            max_request_pixels=config.max_request_pixels,
        )
        self.openai = OpenAIService(
            config,
            model_name,
            engine,
            door,
            image_limits=self._image_limits,
            max_prompt_chars=self._limits.max_prompt_chars,
        )

    async def generate_stream(self, params: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Answers one request of the worker protocol, as records of cumulative text.

        The first record comes at once and holds the prompt alone; while nothing new comes, the
        last one is repeated. Closing the iterator gives the request up and frees its place.

        Args:
            params: the request's JSON, as it came.

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        request = WorkerRequest.parse(params, self._limits)
        with self.door.enter():
            text = request.prompt if request.echo else ""
            is_empty = request.params.max_new_tokens == 0
            updates = paced(self._start(request), sign_of_life_s=self.config.sign_of_life_s)
            del params, request  # megabytes of base64, not to be held until the answer's end
            async with aclosing(updates):
                if not is_empty:
                    yield text_record(text, Usage())
                async for update in updates:
                    if is_empty and update.finish_reason is None:
                        continue  # the whole answer is one record, with the prompt
                    text += update.text
                    yield text_record(text, update.usage, update.finish_reason)

    async def generate_stream_gate(self, params: Any) -> AsyncGenerator[bytes, None]:
        """`generate_stream` as bytes, each record with its zero byte, errors made into records."""
        try:
            records = self.generate_stream(params)
            del params
            async with aclosing(records):
                async for record in records:
                    yield frame(record)
        except Exception as error:
            yield frame(error_record(error))

    async def generate(
        self, params: dict[str, Any] | None = None, **more: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """For Python callers: the answer in pieces, without the prompt and without repetitions.

        Args:
            params, more: the request's fields, as a dict or as keyword arguments; `images` may
                hold the pictures' files as bytes, too.

        Yields:
            `text` (new, and final), `finish_reason` (None until the last), `usage`.

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        request = {**(params or {}), **more, "echo": False}
        if isinstance(request.get("images"), (list, tuple)):
            request["images"] = [_as_base64(image) for image in request["images"]]
        sent = 0
        records = self.generate_stream(request)
        del params, more, request
        async with aclosing(records):
            async for record in records:
                text = record["text"][sent:]
                if text or record["finish_reason"] is not None:
                    sent += len(text)
                    yield {
                        "text": text,
                        "finish_reason": record["finish_reason"],
                        "usage": record["usage"],
                    }

    async def chat(
        self, request: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
        """For Python callers: /v1/chat/completions, with the same shapes.

        Args:
            request: the body; an `image_url` may hold a picture's file as bytes, too. With
                `stream`, call it through a handle with `options(stream=True)`.

        Returns:
            The whole answer, or an iterator over its chunks, without "[DONE]".

        Raises:
            TinyChatError: whatever is wrong with the request, the queue or the engine.
        """
        generation = await self.openai.chat(request)
        if generation.options.stream:
            return _without_signs(generation.chunks())
        return await generation.whole()

    async def count_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, each `<image>` with all its positions."""
        if len(prompt) > self._limits.max_prompt_chars:
            return len(prompt)  # more than fits in any case, and not worth the tokenising
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.engine.count_tokens, prompt)

    @property
    def template(self) -> Template:
        """The conversation template that the model was trained with."""
        return self.engine.template

    def load(self) -> ApplicationLoad:
        """The application's: this replica's, as long as it knows of no others."""
        return ApplicationLoad(self.door.count, 1)

    def get_status(self) -> dict[str, Any]:
        """What controllers ask for. `speed` is the number of live replicas."""
        load = self.load()
        return {
            "model_names": [self.model_name],
            "speed": load.replicas,
            "queue_length": load.queue_length,
        }

    def get_queue_length(self) -> int:
        """Requests running and waiting, over all replicas."""
        return self.load().queue_length

    def get_replica_count(self) -> int:
        """Requests running and waiting in this replica alone."""
        return self.door.count

    def drain(self) -> None:
        """Refuses new requests from now on; those inside are answered to their end."""
        self.door.close()

    def get_stats(self) -> dict[str, Any]:
        """The engine's figures, and the door's."""
        return {
            **asdict(self.engine.stats()),
            "queue_length": self.door.count,
            "queue_limit": self.door.limit,
        }

    def check_health(self) -> None:
        """Raises EngineDead once the engine can answer no more; quick, since it gates liveness."""
        self.engine.check_health()

    async def warm_up(self) -> None:
        """Takes one tiny picture and two tokens through everything that a request goes through.

        The picture is left out where pictures are not allowed.

        Raises:
            EngineFault: it was not answered, so no request would be.
        """
        picture = io.BytesIO()
        Image.new("RGB", (32, 32), (127, 127, 127)).save(picture, "PNG")
        last: dict[str, Any] = {}
        images = [base64.b64encode(picture.getvalue()).decode("ascii")][: self.config.max_images]
        params = {
            "prompt": f"{IMAGE_PLACEHOLDER}\n" * len(images) + "What is this?",
            "images": images,
            "max_new_tokens": 2,
            "temperature": 0,
        }
        async with aclosing(self.generate_stream(params)) as records:
            async for record in records:
                last = record
        if last.get("finish_reason") is None:
            raise EngineFault(f"the model did not finish its first answer: {last}")

    async def close(self) -> None:
        """Ends what runs, and the engine."""
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)

    def _start(self, request: WorkerRequest) -> AsyncGenerator[GenerationDelta, None]:
        deltas = self.engine.stream(
            request.model_prompt,
            partial(decode_images, request.images, self._image_limits),
            request.params,
            queue_timeout_s=self.config.queue_timeout_s,
            min_interval_s=1 / self.config.max_records_per_s,
        )
        current_entry().add_prompt(request.prompt, len(request.images))
        return current_entry().watched(deltas)


async def _without_signs(
    chunks: AsyncGenerator[dict[str, Any] | None, None],
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk is not None:
                yield chunk


def _as_base64(image: Any) -> Any:
    return base64.b64encode(image).decode("ascii") if isinstance(image, bytes) else image
