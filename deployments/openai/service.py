"""What the OpenAI routes do, without HTTP: requests' JSON -> generations, tokens, models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from deployments import fields
from deployments.config import AppConfig
from deployments.door import Door
from deployments.image_fetcher import ImageFetcher
from deployments.media import ImageLimits
from deployments.model_source import AWQ_SUFFIX
from deployments.openai.answer import ChatAnswer, CompletionAnswer
from deployments.openai.errors import UnknownModel
from deployments.openai.generation import Backend, Generation
from deployments.openai.messages import parse_messages
from deployments.openai.request import ChatRequest, CompletionRequest, OpenAILimits
from deployments.openai.token_names import TokenNames
from models.errors import InvalidRequest

if TYPE_CHECKING:
    from models import Engine, Prompt

T = TypeVar("T")


class OpenAIService:
    """One model behind OpenAI's API."""

    def __init__(
        self,
        config: AppConfig,
        model_name: str,
        engine: Engine,
        door: Door,
        *,
        image_limits: ImageLimits,
        max_prompt_chars: int,
    ) -> None:
        self.model_name = model_name
        self._engine = engine
        self._door = door
        self._config = config
        self._max_prompt_chars = max_prompt_chars
        self._started = int(time.time())
        fetcher = ImageFetcher(
            config.allowed_image_hosts,
            max_bytes=config.max_image_bytes,
            max_total_bytes=config.max_body_bytes,
            timeout_s=config.image_fetch_timeout_s,
        )
        self._backend = Backend(config, engine, door, image_limits, fetcher)

    async def chat(self, body: object) -> Generation:
        """
        Raises:
            InvalidRequest: the body is wrong, or asks for another model (UnknownModel).
        """
        request = ChatRequest.parse(body, self._limits)
        options = request.options
        self._check_model(options.model)
        template = self._engine.template
        messages = request.chat.messages
        prompt = await _off_loop(
            lambda: template.render(messages, add_generation_prompt=request.add_generation_prompt)
        )
        answer = ChatAnswer(
            options.model or self.model_name,
            self._names,
            logprobs=options.params.logprobs,
            prompt_logprobs=options.prompt_logprobs,
        )
        return Generation(
            self._backend, options, answer, [prompt], request.chat.pictures, template.stop_strings
        )

    async def complete(self, body: object) -> Generation:
        """
        Raises:
            InvalidRequest: the body is wrong, or asks for another model (UnknownModel).
        """
        request = CompletionRequest.parse(body, self._limits)
        options = request.options
        self._check_model(options.model)
        prompts = request.prompts
        echoed = await _off_loop(lambda: list(map(self._text, prompts))) if request.echo else []
        answer = CompletionAnswer(
            options.model or self.model_name,
            self._names,
            logprobs=options.params.logprobs,
            prompt_logprobs=options.prompt_logprobs,
            echoed=[text for text in echoed for _ in range(options.n)],
        )
        return Generation(self._backend, options, answer, prompts)

    async def tokenize(self, body: object) -> dict[str, Any]:
        """The tokens of a text, or of a conversation without pictures, as the model gets it.

        Raises:
            InvalidRequest: the body is wrong.
        """
        body = fields.mapping("body", body)
        self._check_model(fields.text("model", body.get("model") or ""))
        if body.get("messages") is not None:
            chat = parse_messages(
                body["messages"], max_images=self._config.max_images,
                max_chars=self._max_prompt_chars,
            )  # fmt: skip
            if chat.pictures:
                raise InvalidRequest(
                    "messages", "hold pictures, which are no tokens of the vocabulary; leave them "
                    "out, and see an answer's usage for how much they count",
                )  # fmt: skip
            add = body.get("add_generation_prompt")
            add = add is None or fields.boolean("add_generation_prompt", add)
            template = self._engine.template
            text = await _off_loop(
                lambda: template.render(chat.messages, add_generation_prompt=add)
            )
        else:
            text = fields.text("prompt", body.get("prompt"))
        if len(text) > self._max_prompt_chars:
            raise InvalidRequest("prompt", "holds more text than fits into the model's context")
        tokens = await _off_loop(lambda: self._engine.encode(text))
        bos = self._engine.tokenizer.bos_token_id
        if body.get("add_special_tokens") is False and bos is not None and tokens[:1] == [bos]:
            tokens = tokens[1:]
        wants_names = body.get("return_token_strs") is True
        return {
            "count": len(tokens),
            "max_model_len": self._engine.context_length,
            "tokens": tokens,
            "token_strs": [self._names.text(i) for i in tokens] if wants_names else None,
        }

    async def detokenize(self, body: object) -> dict[str, Any]:
        """The text of tokens.

        Raises:
            InvalidRequest: the body is wrong.
        """
        body = fields.mapping("body", body)
        self._check_model(fields.text("model", body.get("model") or ""))
        given = fields.array("tokens", body.get("tokens"))
        if len(given) > self._max_prompt_chars:
            raise InvalidRequest("tokens", "are more than fit into the model's context")
        tokens = [fields.integer("tokens", token) for token in given]
        self._engine.check_tokens("tokens", tokens)
        return {"prompt": await _off_loop(lambda: self._engine.decode(tokens))}

    def models(self) -> dict[str, Any]:
        """The one that is served, in OpenAI's form and in llama.cpp's."""
        return {
            "object": "list",
            "data": [self._model()],
            "models": [
                {
                    "name": self.model_name,
                    "model": self.model_name,
                    "capabilities": ["completion", "multimodal"],
                }
            ],
        }

    def model(self, name: str) -> dict[str, Any]:
        """
        Raises:
            UnknownModel: another one is served.
        """
        self._check_model(name)
        return self._model()

    def _text(self, prompt: Prompt) -> str:
        """Raises InvalidRequest for ids of no token."""
        if isinstance(prompt, str):
            return prompt
        self._engine.check_tokens("prompt", prompt)
        return self._engine.decode(prompt)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "tinychat-serve",
            "root": self.model_name.removesuffix(AWQ_SUFFIX),
            "parent": None,
            "max_model_len": self._engine.context_length,
        }

    def _check_model(self, name: str) -> None:
        """By the name that it is registered under, by the checkpoint's, or by none."""
        if name not in {"", self.model_name, self.model_name.removesuffix(AWQ_SUFFIX)}:
            raise UnknownModel(
                "model", f"{fields.show(name)} is not served here; {self.model_name!r} is"
            )

    @property
    def _limits(self) -> OpenAILimits:
        return OpenAILimits(
            max_tokens=min(self._config.max_new_tokens_cap, self._engine.context_length),
            max_choices=self._door.limit,
            max_images=self._config.max_images,
            max_prompt_chars=self._max_prompt_chars,
        )

    @property
    def _names(self) -> TokenNames:
        # For one request, which may name the same tokens thousands of times.
        return TokenNames(cache(self._engine.token_text), cache(self._engine.token_bytes))


async def _off_loop(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work)
