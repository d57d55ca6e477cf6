"""The objects that OpenAI's clients get: whole answers, and chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.openai.prompt_logprobs import by_token_id, offsets
from deployments.openai.token_names import TokenNames, finite
from deployments.pacing import Update
from models import PromptToken, TokenLogprobs, Usage


@dataclass
class Choice:
    """One answer as it has come so far."""

    text: str = ""
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PromptToken, ...] = ()

    def add(self, update: Update) -> None:
        self.text += update.text
        self.usage = update.usage
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs


class Answer(ABC):
    """One request's answer: it writes all objects that belong to it."""

    prefix: str
    whole_object: str
    chunk_object: str
    scores_prompts_once: bool
    """Whether of several choices with one prompt the first one's log-probabilities of it do."""

    def __init__(
        self,
        model: str,
        names: TokenNames,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> None:
        """
        Args:
            model: as the request names it.
            logprobs: how many tokens were asked for beside each; None: no log-probabilities.
            prompt_logprobs: the same of the prompt, in vLLM's form.
        """
        self._names = names
        self._logprobs_wanted = logprobs
        self._prompt_logprobs_wanted = prompt_logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """What comes before any text."""
        return []

    def chunk(self, index: int, update: Update) -> dict[str, Any]:
        """What is new in one choice."""
        return self._chunk([self._choice_chunk(index, update)])

    def usage_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": used}

    def whole(self, choices: Sequence[Choice], used: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            choices: finished ones.
        """
        written = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": written, "usage": used}

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """vLLM's extra field, where it was asked for."""
        wanted = self._prompt_logprobs_wanted
        if wanted is None:
            return {}
        return {"prompt_logprobs": by_token_id(choice.prompt_logprobs, wanted, self._names)}

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _choice_chunk(self, index: int, update: Update) -> dict[str, Any]: ...

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    scores_prompts_once = True

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """The role, in a chunk of its own."""
        return [
            self._chunk([_chat_delta(index, {"role": "assistant", "content": ""})])
            for index in range(num_choices)
        ]

    def whole(self, choices: Sequence[Choice], used: dict[str, Any]) -> dict[str, Any]:
        """All choices have one prompt."""
        return {**super().whole(choices, used), **self._of_prompt(choices[0])}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _choice_chunk(self, index: int, update: Update) -> dict[str, Any]:
        written = _chat_delta(index, {"content": update.text})
        written["logprobs"] = self._logprobs(update.logprobs)
        written["finish_reason"] = update.finish_reason
        if update.finish_reason is not None:
            written["stop_reason"] = update.stop_reason
        return written

    def _logprobs(self, tokens: Iterable[TokenLogprobs]) -> dict[str, Any] | None:
        if self._logprobs_wanted is None:
            return None
        return {
            "content": [
                {
                    **self._token(token.token_id, token.logprob),
                    "top_logprobs": [self._token(*pair) for pair in token.top],
                }
                for token in tokens
            ]
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._names.text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._names.bytes(token_id)),
        }


def _chat_delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    scores_prompts_once = False

    def __init__(
        self,
        model: str,
        names: TokenNames,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        echoed: Sequence[str] = (),
    ) -> None:
        """
        Args:
            echoed: each choice's prompt, where texts are to begin with it.
        """
        super().__init__(model, names, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        self._echoed = echoed
        self._offsets: dict[int, int] = defaultdict(int)

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """The prompts, where they are wanted. Their log-probabilities come with the first token's,
        and they with them."""
        if self._logprobs_wanted is not None:
            return []
        return [
            self._chunk([_text_choice(index, prompt)]) for index, prompt in enumerate(self._echoed)
        ]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        prompt = self._echoed[index] if self._echoed else ""
        return {
            **_text_choice(index, prompt + choice.text),
            "logprobs": self._logprobs(index, choice),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self._of_prompt(choice),
        }

    def _choice_chunk(self, index: int, update: Update) -> dict[str, Any]:
        begins = self._echoed and update.prompt_logprobs
        return {
            **_text_choice(index, (self._echoed[index] if begins else "") + update.text),
            "logprobs": self._logprobs(index, update),
            "finish_reason": update.finish_reason,
            "stop_reason": update.stop_reason,
        }

    def _logprobs(self, index: int, part: Choice | Update) -> dict[str, Any] | None:
        if self._logprobs_wanted is None:
            return None
        written: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        if self._echoed and part.prompt_logprobs:
            prompt = self._echoed[index]
            starts = offsets(prompt, part.prompt_logprobs, self._names)
            for known, start in zip(part.prompt_logprobs, starts, strict=True):
                self._write(written, known, start)
            self._offsets[index] = len(prompt)
        for token in part.logprobs:
            text = self._write(written, token, self._offsets[index])
            self._offsets[index] += len(text)
        return written

    def _write(
        self, written: dict[str, list[Any]], token: PromptToken | TokenLogprobs, offset: int
    ) -> str:
        """Returns the token's text."""
        text = "" if token.token_id is None else self._names.text(token.token_id)
        written["tokens"].append(text)
        written["text_offset"].append(offset)
        written["token_logprobs"].append(None if token.logprob is None else finite(token.logprob))
        written["top_logprobs"].append(self._top(token, text))
        return text

    def _top(self, token: PromptToken | TokenLogprobs, text: str) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        pairs = [(self._names.text(i), value) for i, value in token.top[: self._logprobs_wanted]]
        top: dict[str, float] = {}
        for name, value in (*pairs, (text, token.logprob)):
            top.setdefault(name, finite(value))  # of several that are written alike, the likeliest
        return top


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def usage_of(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """Of a whole request.

    Args:
        usages: of each choice; the first `n` belong to the first prompt, and so on.
        n: choices of each prompt, which counts once.
    """
    # Choices that have said nothing yet know of no prompt.
    prompts = [
        max(usages[i : i + n], key=lambda usage: usage.prompt_tokens)
        for i in range(0, len(usages), n)
    ]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
    }
