"""The conversation formats that LLaVA's and VILA's models were trained with.

Clients of the worker protocol send finished prompts, so there a template counts only for the
tokens that end an answer; our own clients, and chat endpoints, write their prompts with it.

Where an answer ends: the engine stops by itself at the tokenizer's end of sequence and at
`stop_tokens`. It does not at `stop_strings`. Upstream's clients send those with each request
(`stop`), upstream's workers know none, and a client's finished prompt may follow another format,
in which "###" is a headline. Whoever renders a conversation puts `stop_strings` into
`SamplingParams.stop`.

Sources: conversation.py of LLaVA (c121f04) and of VILA (b760c34), qwen2.jinja of VILA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from models.errors import ConfigurationError
from models.prompts.messages import Conversation, Message, Part, joined
from models.prompts.tokenizer import IMAGE_PLACEHOLDER, Tokenizer
from models.registry import Registry


class Template(ABC):
    """How a conversation becomes one text.

    Attributes:
        system: the system message where the client sends none; "" where that is not known.
        stop_tokens: names of tokens that end an answer, besides the tokenizer's end of sequence.
        stop_strings: what a client sends as `stop`; see above.
    """

    name: str
    system: str
    stop_tokens: tuple[str, ...]
    stop_strings: tuple[str, ...]

    @abstractmethod
    def render(self, messages: Iterable[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation's text, `<image>` for each picture.

        Args:
            add_generation_prompt: end with what the model's answer follows.

        Raises:
            InvalidRequest: messages in an order that is no conversation; see `Conversation.of`.
        """


@dataclass(frozen=True)
class WrittenTemplate(Template):
    """`beginning`, `opening`, turns, and `reply` for the model to go on.

    Attributes:
        user: one question, as `{text}`.
        assistant: one finished answer, as `{text}`.
        reply: what the model's answer follows.
        opening: what stands before the first turn; `{system}` in it is the system message. Left
            out where the system message is empty.
        opening_in_question: `opening` is put into the first question instead.
        beginning: before everything.
        between: before each question but the first.
        image_separator: between a picture's place and the text beside it.
    """

    name: str
    user: str
    assistant: str
    reply: str
    system: str = ""
    opening: str = ""
    opening_in_question: bool = False
    beginning: str = ""
    between: str = ""
    image_separator: str = "\n"
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def load(self, folder: Path, tokenizer: Tokenizer) -> Template:
        """The same for every checkpoint."""
        return self

    def render(self, messages: Iterable[Message], *, add_generation_prompt: bool = True) -> str:
        conversation = Conversation.of(messages)
        system = self.system if conversation.system is None else conversation.system
        opening = self.opening.replace("{system}", system) if system else ""
        written = [self.beginning, "" if self.opening_in_question else opening]
        for index, parts in enumerate(conversation.turns):
            text = self._text(parts)
            if index == 0 and self.opening_in_question:
                text = opening + text
            is_question = index % 2 == 0
            written.append(self.between if is_question and index > 0 else "")
            written.append((self.user if is_question else self.assistant).replace("{text}", text))
        if add_generation_prompt:
            conversation.require_question()
            written.append(self.reply)
        return "".join(written)

    def _text(self, parts: Iterable[Part]) -> str:
        return joined(parts, IMAGE_PLACEHOLDER, self.image_separator)


class TemplateSource(Protocol):
    """An entry of the registry: a template, or where to find one in a checkpoint."""

    def load(self, folder: Path, tokenizer: Tokenizer) -> Template:
        """
        Args:
            folder: the tokenizer's.

        Raises:
            CheckpointError: the folder holds no template, or one that cannot be used.
        """


TEMPLATES: Registry[TemplateSource] = Registry("conversation template", ConfigurationError)


def load_template(name: str, folder: Path, tokenizer: Tokenizer) -> Template:
    """
    Raises:
        ConfigurationError: there is none of that name.
        CheckpointError: it is the checkpoint's own, which the folder does not hold.
    """
    return TEMPLATES[name].load(folder, tokenizer)


def written_templates() -> list[str]:
    """Names of those that can be used without a checkpoint at hand."""
    return [name for name in TEMPLATES if isinstance(TEMPLATES[name], WrittenTemplate)]


def get_template(name: str) -> WrittenTemplate:
    """
    Raises:
        ConfigurationError: there is none of that name, or it comes with each checkpoint.
    """
    template = TEMPLATES[name]
    if not isinstance(template, WrittenTemplate):
        raise ConfigurationError(
            f"the conversation template {name!r} is in the checkpoint and cannot be used without "
            f"it; known otherwise: {', '.join(written_templates())}"
        )
    return template


def stop_token_ids(template: Template, tokenizer: Tokenizer) -> set[int]:
    """The tokenizer's end of sequence, and what the template ends turns with."""
    named = (tokenizer.token_to_id(token) for token in template.stop_tokens)
    return {*tokenizer.eos_token_ids, *(token for token in named if token is not None)}


_VICUNA = WrittenTemplate(
    name="vicuna_v1",
    system="A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions.",
    opening="{system} ",
    user="USER: {text} ",
    assistant="ASSISTANT: {text}</s>",
    reply="ASSISTANT:",
    stop_strings=("</s>",),
)
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_LLAMA_2 = WrittenTemplate(
    name="llava_llama_2",
    system=_HELPFUL,
    opening="<<SYS>>\n{system}\n<</SYS>>\n\n",
    opening_in_question=True,
    user="[INST] {text} [/INST]",
    assistant=" {text} </s>",
    reply="",
    between="<s>",  # the first one is the tokenizer's
    stop_strings=("</s>",),
)
_CHATML = WrittenTemplate(
    name="chatml_direct",
    system="Answer the questions.",
    opening="<|im_start|>system\n{system}<|im_end|>",
    user="<|im_start|>user\n{text}<|im_end|>",
    assistant="<|im_start|>assistant\n{text}<|im_end|>",
    reply="<|im_start|>assistant\n",
    stop_tokens=("<|im_end|>",),
    stop_strings=("<|im_end|>",),
)
_QWEN = WrittenTemplate(
    name="qwen",
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    opening="<|im_start|>system\n{system}<|im_end|>\n",
    user="<|im_start|>user\n{text}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{text}<|im_end|>\n",
    reply="<|im_start|>assistant\n",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    stop_strings=("<|im_end|>",),
)

for _template in (
    _VICUNA,
    replace(_VICUNA, name="llava_v1", system=_HUMAN),
    WrittenTemplate(
        name="llava_v0",
        system=_HUMAN,
        opening="{system}###",
        user="Human: {text}###",
        assistant="Assistant: {text}###",
        reply="Assistant:",
        stop_strings=("###",),
    ),
    _LLAMA_2,
    replace(_LLAMA_2, name="mistral_instruct", system="", between=""),
    _CHATML,
    replace(_CHATML, name="hermes-2"),
    WrittenTemplate(
        name="llama_3",
        system=_HELPFUL,
        beginning="<|begin_of_text|>",
        opening="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{text}<|eot_id|>",
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
        stop_strings=("<|eot_id|>", "<|end_of_text|>"),
    ),
    _QWEN,
    # The encoder puts the newline behind a picture; see `PromptSpec.image_suffix`.
    replace(_QWEN, name="nvila", system="You are a helpful assistant", image_separator=""),
    # LLaVA's first training stage: a picture, a caption, no roles.
    WrittenTemplate(
        name="plain", user="{text}\n", assistant="{text}\n", reply="", stop_strings=("\n",)
    ),
):
    TEMPLATES.register(_template.name, _template)
