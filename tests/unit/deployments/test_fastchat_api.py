"""FastChat's front ends write prompts as the model's own template does."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.fastchat_api import FORMATS, conversation
from models.errors import InvalidRequest
from models.prompts import Message, get_template, written_templates

fastchat = pytest.importorskip("fastchat.conversation")


def by_fastchat(template: str, *texts: str) -> str:
    fields: dict[str, Any] = conversation(template, get_template(template).system, [2])
    fields["sep_style"] = fastchat.SeparatorStyle(fields["sep_style"])
    conv = fastchat.Conversation(**fields)
    for index, text in enumerate(texts):
        conv.append_message(conv.roles[index % 2], text)
    conv.append_message(conv.roles[1], None)
    return str(conv.get_prompt())


@pytest.mark.parametrize("template", written_templates())
def test_every_written_template_can_be_told_to_fastchat(template: str) -> None:
    for texts in (["<image>\nq1"], ["q1", "a1", "q2"], ["q1", "a1", "q2", "a2", "q3"]):
        messages = [Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts)]
        assert by_fastchat(template, *texts) == get_template(template).render(messages)


def test_a_program_cannot_be_told_to_fastchat_and_the_message_says_what_can() -> None:
    assert set(FORMATS) == set(written_templates())
    with pytest.raises(InvalidRequest, match="'tokenizer'.*conv_mode can be one of: vicuna_v1"):
        conversation("tokenizer", "", [2])
