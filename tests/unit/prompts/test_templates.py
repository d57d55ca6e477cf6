"""Conversations are written as the models were trained (reference/checkpoints.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoints.template_choice import BY_NAME
from models.errors import ConfigurationError
from models.loading import _stop_tokens
from models.prompts import TEMPLATES, get_template, load_tokenizer
from tests.synthetic import rewrite_json, write_tiny_llava

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAVA = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
WRITTEN = {
    "vicuna_v1": f"{VICUNA} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    "llava_v1": f"{LLAVA} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    "llava_v0": f"{LLAVA}###Human: q1###Assistant: a1###Human: q2###Assistant:",
    "llava_llama_2": f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\nq1 [/INST] a1 </s><s>"
    "[INST] q2 [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
    "q1<|im_end|><|im_start|>assistant\na1<|im_end|><|im_start|>user\nq2<|im_end|>"
    "<|im_start|>assistant\n",
    "llama_3": "<|begin_of_text|>" + HEADER.format("system") + f"{HELPFUL}<|eot_id|>"
    + HEADER.format("user") + "q1<|eot_id|>" + HEADER.format("assistant") + "a1<|eot_id|>"
    + HEADER.format("user") + "q2<|eot_id|>" + HEADER.format("assistant"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_in_training(name: str) -> None:
    template = get_template(name)
    assert template.name == name
    assert template.render("q2", [("q1", "a1")]) == WRITTEN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_turn_is_the_beginning_of_a_longer_one(name: str) -> None:
    """So that the next turn of a conversation finds its beginning in the prefix cache."""
    template = get_template(name)
    first = template.render("<image>\nq1")
    assert template.render("q2", [("<image>\nq1", "a1")]).startswith(first)


@pytest.mark.parametrize("name", TEMPLATES)
def test_braces_of_users_are_text(name: str) -> None:
    text = get_template(name).render("{system} {text} {0}", system="{text}")
    assert "{system} {text} {0}" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_system_message_can_be_replaced(name: str) -> None:
    template = get_template(name)
    assert "Be brief." in template.render("q", system="Be brief.")
    assert template.system not in template.render("q", system="Be brief.")


def test_an_unknown_template_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'alpaca'; known: vicuna_v1, llava_v1, llava_v0"):
        get_template("alpaca")


def test_every_template_that_a_name_can_choose_exists() -> None:
    assert {template for _, template in BY_NAME} | {"vicuna_v1", "llama_3"} <= set(TEMPLATES)


def test_answers_end_at_the_tokenizers_and_the_templates_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", awq=False)
    assert _stop_tokens("vicuna_v1", load_tokenizer(folder)) == {2}
    assert _stop_tokens("llama_3", load_tokenizer(folder)) == {2}, "names that it lacks are no ids"
    rewrite_json(folder / "tokenizer_config.json", added_tokens_decoder={
        "400": {"content": "<|eot_id|>", "special": True},
        "401": {"content": "<|end_of_text|>", "special": True},
    })  # fmt: skip
    assert _stop_tokens("llama_3", load_tokenizer(folder)) == {2, 400, 401}
