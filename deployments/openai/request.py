"""Bodies of /v1/chat/completions and /v1/completions, checked and completed.

Names and defaults are OpenAI's and, beyond them, vLLM's. Fields that are not read here are
ignored, and null means absent. What a client would miss in the answer (tools, beams, ...) is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deployments import fields
from deployments.openai.messages import Chat, parse_messages
from deployments.openai.sampling import parse_sampling
from models import SamplingParams
from models.engine.sampling_params import MAX_LOGPROBS
from models.errors import InvalidRequest
from models.prompts.tokenizer import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from models import Prompt

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions, and vLLM's."""


@dataclass(frozen=True)
class OpenAILimits:
    """
    Attributes:
        max_tokens: larger `max_tokens` are lowered to it.
        max_choices: answers to one request.
        max_prompt_chars: far more than can ever fit into the context.
    """

    max_tokens: int
    max_choices: int
    max_images: int
    max_prompt_chars: int


@dataclass(frozen=True)
class Options:
    """What both kinds of request have.

    Attributes:
        model: as the request names it; "" where it names none.
        guide_field: the field that `params.guide` comes from.
        n: answers to each prompt.
        prompt_logprobs: so many of the likeliest tokens of each position of the prompt does the
            answer name; `params.prompt_logprobs` may be more, to be echoed.
        include_usage: a streamed answer's last chunk holds the usage.
        continuous_usage: and so does each other chunk.
    """

    model: str
    params: SamplingParams
    guide_field: str = ""
    n: int = 1
    prompt_logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """
    Attributes:
        add_generation_prompt: end the prompt with what the model's answer follows.
    """

    chat: Chat
    options: Options
    add_generation_prompt: bool = True

    @classmethod
    def parse(cls, body: object, limits: OpenAILimits) -> ChatRequest:
        """
        Raises:
            InvalidRequest: a field is missing, wrong, or asks for what is not done here.
        """
        body = fields.mapping("body", body)
        _refuse_tools(body)
        _refuse(body, "chat_template", "is not taken from requests; the model's own is used")
        kwargs = body.get("chat_template_kwargs")
        if isinstance(kwargs, dict) and "chat_template" in kwargs:
            _refuse(kwargs, "chat_template", "is not taken from requests; the model's own is used")
        _refuse(body, "continue_final_message", "is not supported; end with a user's message")
        _refuse(body, "audio", "is not supported; this model answers in text")
        chat = parse_messages(
            body.get("messages"), max_images=limits.max_images, max_chars=limits.max_prompt_chars
        )
        max_tokens = _max_tokens(body, limits, least=1, default=limits.max_tokens)
        options = _options(body, limits, max_tokens, _chat_logprobs(body))
        add = body.get("add_generation_prompt")
        return cls(chat, options, add is None or fields.boolean("add_generation_prompt", add))


@dataclass(frozen=True)
class CompletionRequest:
    """
    Attributes:
        prompts: finished ones, as texts or as token ids; each is answered by itself.
        echo: whether texts begin with their prompts, and log-probabilities with those of them.
    """

    prompts: tuple[Prompt, ...]
    options: Options
    echo: bool = False

    @classmethod
    def parse(cls, body: object, limits: OpenAILimits) -> CompletionRequest:
        """
        Raises:
            InvalidRequest: a field is missing, wrong, or asks for what is not done here.
        """
        body = fields.mapping("body", body)
        _refuse(body, "suffix", "is not supported; this model writes from left to right")
        prompts = _prompts(body.get("prompt"), limits)
        max_tokens = _max_tokens(body, limits, least=0, default=COMPLETION_MAX_TOKENS)
        echo = body.get("echo") is not None and fields.boolean("echo", body["echo"])
        logprobs = body.get("logprobs")
        if logprobs is not None:
            logprobs = fields.integer("logprobs", logprobs)
        options = _options(body, limits, max_tokens, logprobs, echoed=logprobs if echo else None)
        if options.n * len(prompts) > limits.max_choices:
            raise InvalidRequest(
                "prompt",
                f"{len(prompts)} prompts, n {options.n}; at most {limits.max_choices} answers "
                "are given to one request",
            )
        return cls(prompts, options, echo)


def _prompts(value: object, limits: OpenAILimits) -> tuple[Prompt, ...]:
    if value is None:
        raise InvalidRequest("prompt", "is missing; it must be text, token ids, or a list of these")
    given = [value] if isinstance(value, str) else fields.array("prompt", value)
    if not given:
        raise InvalidRequest("prompt", "is empty; it must hold at least one text or token id")
    if not isinstance(given[0], (str, list, tuple)):
        given = [given]
    prompts = tuple(_prompt(prompt) for prompt in given)
    if sum(map(len, prompts)) > limits.max_prompt_chars * min(len(prompts), limits.max_choices):
        raise InvalidRequest("prompt", "holds more text than fits into the model's context")
    return prompts


def _prompt(value: object) -> Prompt:
    if isinstance(value, (list, tuple)):
        return tuple(fields.integer("prompt", token) for token in value)
    prompt = fields.text("prompt", value)
    if IMAGE_PLACEHOLDER in prompt:
        raise InvalidRequest(
            "prompt",
            f"holds {IMAGE_PLACEHOLDER}, a picture's place; ask about pictures through "
            "/v1/chat/completions, or /worker_generate_stream",
        )
    return prompt


def _options(
    body: Mapping[str, Any],
    limits: OpenAILimits,
    max_tokens: int,
    logprobs: int | None,
    echoed: int | None = None,
) -> Options:
    """
    Args:
        echoed: `logprobs`, where the prompt's are wanted, too.
    """
    _refuse(body, "use_beam_search", "is not supported; leave it out")
    model = body.get("model")
    n = 1 if body.get("n") is None else fields.integer("n", body["n"])
    if not 1 <= n <= limits.max_choices:
        raise InvalidRequest("n", f"{n} is out of range; it must be 1 to {limits.max_choices}")
    if body.get("best_of") not in (None, n):
        raise InvalidRequest("best_of", "is not supported; use n alone")
    stream = body.get("stream") is not None and fields.boolean("stream", body["stream"])
    usage, continuous = _stream_options(body.get("stream_options"), stream)
    prompt_logprobs = body.get("prompt_logprobs")
    if prompt_logprobs is not None:
        prompt_logprobs = _number_of_top("prompt_logprobs", prompt_logprobs)
        if stream:
            raise InvalidRequest("prompt_logprobs", "are for whole answers only; do not stream")
    scored = [number for number in (prompt_logprobs, echoed) if number is not None]
    params, guide_field = parse_sampling(
        body, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=max(scored, default=None)
    )
    return Options(
        model="" if model is None else fields.text("model", model),
        params=params,
        guide_field=guide_field,
        n=n,
        prompt_logprobs=prompt_logprobs,
        stream=stream,
        include_usage=usage,
        continuous_usage=continuous,
    )


def _stream_options(value: object, stream: bool) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats); the second counts only with the first."""
    field = "stream_options"
    if value is None:
        return False, False
    options = fields.mapping(field, value)
    if not stream:
        raise InvalidRequest(field, "is for streams only; set stream to true, or leave it out")
    flags = [
        options.get(name) is not None and fields.boolean(f"{field}.{name}", options[name])
        for name in ("include_usage", "continuous_usage_stats")
    ]
    return flags[0], all(flags)


def _max_tokens(body: Mapping[str, Any], limits: OpenAILimits, *, least: int, default: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            tokens = fields.integer(name, value)
            if tokens < least:
                raise InvalidRequest(name, f"{tokens} is out of range; it must be {least} or more")
            return min(tokens, limits.max_tokens)
    return min(default, limits.max_tokens)


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = body.get("top_logprobs")
    wanted = body.get("logprobs") is not None and fields.boolean("logprobs", body["logprobs"])
    if top is not None:
        top = _number_of_top("top_logprobs", top)
        if top and not wanted:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    return (top or 0) if wanted else None


def _number_of_top(field: str, value: object) -> int:
    number = fields.integer(field, value)
    if not 0 <= number <= MAX_LOGPROBS:
        raise InvalidRequest(field, f"{number} is out of range; it must be 0 to {MAX_LOGPROBS}")
    return number


def _refuse_tools(body: Mapping[str, Any]) -> None:
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if body.get(tools) and body.get(choice) != "none":
            raise InvalidRequest(
                tools, f'are not supported; leave them out, or set {choice} to "none"'
            )


def _refuse(body: Mapping[str, Any], name: str, problem: str) -> None:
    if body.get(name) not in (None, False, ""):
        raise InvalidRequest(name, problem)
