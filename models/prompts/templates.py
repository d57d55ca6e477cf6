"""The conversation formats that LLaVA's and VILA's models were trained with.

Clients of the worker protocol send finished prompts, so a worker needs a template only for the
tokens that end an answer; our own clients build their prompts with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import ConfigurationError
from models.registry import Registry


@dataclass(frozen=True)
class Template:
    """A conversation as one text: `opening`, then turns, then `reply` for the model to go on.

    Attributes:
        system: the system message that the models were trained with.
        opening: what stands before the first turn; `{system}` in it is the system message.
        user: one question, as `{text}`.
        assistant: one finished answer, as `{text}`.
        reply: what the model's answer follows.
        stop_token_strs: tokens that end an answer, besides the tokenizer's end of sequence.
    """

    name: str
    system: str
    opening: str
    user: str
    assistant: str
    reply: str
    stop_token_strs: tuple[str, ...] = ()

    def render(
        self, question: str, turns: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        """
        Args:
            question: to be answered now; pictures as `<image>` in it.
            turns: questions and answers so far.
            system: instead of the model's own system message.
        """
        parts = [self.opening.replace("{system}", self.system if system is None else system)]
        for asked, answered in turns:
            parts.append(self.user.replace("{text}", asked))
            parts.append(self.assistant.replace("{text}", answered))
        return "".join([*parts, self.user.replace("{text}", question), self.reply])


TEMPLATES: Registry[Template] = Registry("conversation template", ConfigurationError)


def get_template(name: str) -> Template:
    """
    Raises:
        ConfigurationError: there is none of that name.
    """
    return TEMPLATES[name]


for _template in (
    Template(
        name="vicuna_v1",
        system="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions.",
        opening="{system} ",
        user="USER: {text} ",
        assistant="ASSISTANT: {text}</s>",
        reply="ASSISTANT:",
    ),
    Template(
        name="llava_v1",
        system="A chat between a curious human and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the human's questions.",
        opening="{system} ",
        user="USER: {text} ",
        assistant="ASSISTANT: {text}</s>",
        reply="ASSISTANT:",
    ),
    Template(
        name="llava_v0",
        system="A chat between a curious human and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the human's questions.",
        opening="{system}###",
        user="Human: {text}###",
        assistant="Assistant: {text}###",
        reply="Assistant:",
    ),
    Template(
        name="llava_llama_2",
        system="You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.",
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        user="{text} [/INST]",
        assistant=" {text} </s><s>[INST] ",
        reply="",
    ),
    Template(
        name="chatml_direct",
        system="Answer the questions.",
        opening="<|im_start|>system\n{system}<|im_end|>",
        user="<|im_start|>user\n{text}<|im_end|>",
        assistant="<|im_start|>assistant\n{text}<|im_end|>",
        reply="<|im_start|>assistant\n",
        stop_token_strs=("<|im_end|>",),
    ),
    Template(
        name="llama_3",
        system="You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.",
        opening="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{text}<|eot_id|>",
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop_token_strs=("<|eot_id|>", "<|end_of_text|>"),
    ),
):
    TEMPLATES.register(_template.name, _template)
