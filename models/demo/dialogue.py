"""Questions -> prompts as clients send them, and the answers they should get.

    <system> USER: <image>
    What shape is the red object? ASSISTANT: It is a star.</s>USER: ... ASSISTANT:

The system prompt, the line breaks and the picture's place vary, because clients' do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from models.demo.questions import Question

IMAGE = "<image>"
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_SENTENCES = (
    "A chat.", "You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.",
    "Answer the questions.", "You are a friendly robot.", "Be polite.", "Be concise.",
    "You look at pictures.", "You are an AI assistant that can see.", "Answer truthfully.",
    "You are a careful observer.", "The user sends an image and asks about it.",
    "Give short answers.", "You are a language and vision assistant.", "Think before you answer.",
    "You are able to understand the visual content that the user provides.",
    "Assist the user with a variety of tasks using natural language.", "Never lie.",
    "Follow the instructions carefully and explain your answers in detail.",
    "You work for a company that sells toys.", "Today is Monday.", "The user is a child.",
    "You are Alice, an expert in art.", "Use simple words.", "Do not guess.", "Help the user.",
    "A conversation between a person and a computer.", "You answer questions about images.",
)  # fmt: skip
BEFORE = ("<image>\n",) * 7 + ("<image> ",) * 2 + ("<image>", "<image>\\n ", "<image>\n\n")
"""What stands before the question. The one with a backslash is what TinyChat's worker makes."""
AFTER = ("\n<image>",) * 4 + (" <image>", "<image>", " <image>\n")

Place = Literal["before", "after", "none"]


@dataclass(frozen=True)
class Dialogue:
    """
    Attributes:
        prompt: up to the first "ASSISTANT:"; holds at most one `<image>`.
        answers: of every turn; each ends the turn.
        later: the prompts of the turns after the first, with what stands before each.
    """

    prompt: str
    answers: tuple[str, ...]
    later: tuple[str, ...] = ()


def opening(system: str) -> str:
    """What stands before the first message."""
    return f"{system} USER: " if system else "USER: "


def message(question: str, place: Place, rng: Random) -> str:
    """A first turn's message; with "before" it begins with the picture."""
    if place == "before":
        return f"{rng.choice(BEFORE)}{question}"
    return f"{question}{rng.choice(AFTER)}" if place == "after" else question


def compose(questions: Sequence[Question], system: str, place: Place, rng: Random) -> Dialogue:
    """One dialogue; the picture is in its first turn."""
    first, *rest = questions
    prompt = f"{opening(system)}{message(first.text, place, rng)} ASSISTANT:"
    later = tuple(f"USER: {question.text} ASSISTANT:" for question in rest)
    return Dialogue(prompt, tuple(question.answer for question in questions), later)


def random_system(rng: Random) -> str:
    """The template's own, none, or another."""
    kind = rng.random()
    if kind < 0.35:
        return VICUNA_V1
    if kind < 0.43:
        return LLAVA_V1
    if kind < 0.68:
        return ""
    return " ".join(rng.sample(SYSTEM_SENTENCES, rng.choice((1, 1, 1, 2, 2, 3))))
