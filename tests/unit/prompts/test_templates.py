"""Conversations are written as LLaVA's and VILA's own code writes them, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.checkpoints import PromptSpec
from models.checkpoints.template_choice import BY_LANGUAGE, BY_NAME
from models.engine.output_text import OutputText
from models.engine.sampling_params import SamplingParams
from models.errors import ConfigurationError, InvalidRequest
from models.prompts import (
    IMAGE,
    TEMPLATES,
    Message,
    Tokenizer,
    get_template,
    load_template,
    load_tokenizer,
    stop_token_ids,
    written_templates,
)
from tests.checkpoint_files import rewrite_json
from tests.tiny import write_tiny_llava

RECORDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "recorded" / "prompts.json").read_text(encoding="utf-8")
)
WRITTEN = written_templates()
every_template = pytest.mark.parametrize("name", WRITTEN)


def dialogue(*texts: str) -> list[Message]:
    """User and assistant by turns."""
    return [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


def render(name: str, *texts: str) -> str:
    return get_template(name).render(dialogue(*texts))


@pytest.mark.parametrize(
    "entry", RECORDED, ids=[f"{e['from']}-{e['template']}-{len(e['turns'])}" for e in RECORDED]
)
def test_a_conversation_is_written_as_upstream_writes_it(entry: dict[str, Any]) -> None:
    texts = [text for turn in entry["turns"] for text in turn]
    assert render(entry["template"], *texts[:-1]) == entry["prompt"]


def test_every_template_was_recorded_or_is_spelled_out_here() -> None:
    assert {entry["template"] for entry in RECORDED} | {"qwen"} == set(WRITTEN)
    assert render("qwen", "q1", "a1", "q2") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    )


@every_template
def test_a_first_turn_is_the_beginning_of_a_longer_one(name: str) -> None:
    """So that the next turn of a conversation finds its beginning in the prefix cache."""
    first = render(name, "<image>\nq1")
    assert render(name, "<image>\nq1", "a1", "q2").startswith(first)


@every_template
def test_a_finished_conversation_is_the_beginning_of_its_continuation(name: str) -> None:
    template = get_template(name)
    finished = template.render(dialogue("q1", "a1"), add_generation_prompt=False)
    assert finished.startswith(render(name, "q1")) and "a1" in finished
    assert render(name, "q1", "a1", "q2").startswith(finished)


@every_template
def test_braces_of_users_are_text(name: str) -> None:
    text = "{system} {text} {0}"
    got = get_template(name).render([Message("system", "{text}"), *dialogue(text)])
    assert text in got


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "plain"])
def test_the_system_message_can_be_replaced_or_left_out(name: str) -> None:
    template = get_template(name)
    replaced = template.render([Message("system", "Be brief."), *dialogue("q")])
    assert "Be brief." in replaced and (not template.system or template.system not in replaced)
    without = template.render([Message("system", ""), *dialogue("q")])
    assert "SYS" not in without and "system" not in without and template.reply in without
    assert len(without) < len(replaced)


def test_mistral_takes_llamas_way_of_a_system_message() -> None:
    got = get_template("mistral_instruct").render([Message("system", "s"), *dialogue("q")])
    assert got == "[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]"


def test_space_around_messages_goes() -> None:
    assert render("vicuna_v1", " q1\n", " a1 ", "q2") == render("vicuna_v1", "q1", "a1", "q2")


# ---- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "written"),
    [
        ("vicuna_v1", [IMAGE, "q"], "<image>\nq"),
        ("vicuna_v1", ["q", IMAGE], "q\n<image>"),
        ("vicuna_v1", [IMAGE, IMAGE, "q", "r"], "<image>\n<image>\nq\nr"),
        ("vicuna_v1", [IMAGE], "<image>"),
        ("vicuna_v1", "in <image> the text", "in <image> the text"),
    ],
)
def test_pictures_have_their_place(name: str, content: Any, written: str) -> None:
    assert get_template(name).render([Message("user", content)]) == render(name, written)


@pytest.mark.parametrize("name", ["nvila", "vicuna_v1"])
def test_where_the_encoder_ends_pictures_with_a_newline_the_text_has_none(name: str) -> None:
    """As VILA joins the parts of a message, whatever its template."""
    spec = PromptSpec(name, tokenization="whole", image_suffix="\n")
    tokenizer = cast("Tokenizer", None)  # written templates ask for none
    template = load_template(spec, Path(), tokenizer)
    assert template.render([Message("user", [IMAGE, "q"])]) == render(name, "<image>q")
    parts = ["compare ", IMAGE, " and ", IMAGE]
    assert template.render([Message("user", parts)]) == render(name, "compare <image> and <image>")


def test_neighbours_of_one_role_are_one_message() -> None:
    messages = [Message("user", [IMAGE]), Message("user", "q")]
    assert get_template("vicuna_v1").render(messages) == render("vicuna_v1", "<image>\nq")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "must be a user's"),
        ([Message("system", "s")], "must be a user's"),
        (dialogue("q", "a"), "the last must be a user's"),
        ([Message("assistant", "a"), *dialogue("q")], "must be a user's"),
        ([*dialogue("q"), Message("system", "s")], "a system message must be the first"),
        ([Message("system", [IMAGE]), *dialogue("q")], "a system message cannot hold pictures"),
        ([Message("tool", "x")], "number 1 is 'tool'; it must be one of system, user, assist"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Message], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^messages: .*{problem}"):
        get_template("vicuna_v1").render(messages)


@given(st.lists(st.sampled_from(["text", " ", "", IMAGE]), min_size=1, max_size=6))
def test_every_picture_is_written_once(parts: list[Any]) -> None:
    for name in WRITTEN:
        text = get_template(name).render([Message("user", parts)])
        assert text.count("<image>") == parts.count(IMAGE)


# ---- names ----------------------------------------------------------------------------------


def test_an_unknown_template_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'alpaca'; known: vicuna_v1, .*plain, tokenizer"):
        get_template("alpaca")


def test_the_tokenizers_own_cannot_be_had_without_a_checkpoint() -> None:
    assert "tokenizer" not in WRITTEN and "tokenizer" in TEMPLATES
    with pytest.raises(ConfigurationError, match="in the checkpoint.*known otherwise: vicuna_v1"):
        get_template("tokenizer")


def test_every_template_that_can_be_chosen_exists() -> None:
    chosen = {template for _, template in BY_NAME} | set(BY_LANGUAGE.values())
    assert chosen | {"vicuna_v1", "llama_3", "nvila", "tokenizer"} <= set(TEMPLATES)
    for name in WRITTEN:
        assert get_template(name).name == name


# ---- where answers end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "stop"),
    [
        (["vicuna_v1", "llava_v1", "llava_llama_2", "mistral_instruct"], "</s>"),
        (["llava_v0"], "###"),
        (["chatml_direct", "hermes-2", "qwen", "nvila"], "<|im_end|>"),
        (["llama_3"], "<|eot_id|>"),
    ],
)
def test_the_stop_string_is_the_one_that_upstreams_clients_send(
    names: list[str], stop: str
) -> None:
    for name in names:
        assert get_template(name).stop_strings[0] == stop
        finished = get_template(name).render(dialogue("q", "a"), add_generation_prompt=False)
        assert finished.split("a", 1)[1].rstrip().endswith(stop), "it stands behind every answer"


def test_answers_end_at_the_tokenizers_and_the_templates_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", awq=False)

    def stops(name: str) -> set[int]:
        tokenizer = load_tokenizer(folder)
        return stop_token_ids(load_template(PromptSpec(name), folder, tokenizer), tokenizer)

    assert stops("vicuna_v1") == {2}
    assert stops("llama_3") == {2}, "names that it lacks are no ids"
    rewrite_json(folder / "tokenizer_config.json", added_tokens_decoder={
        "400": {"content": "<|eot_id|>", "special": True},
        "401": {"content": "<|end_of_text|>", "special": True},
    })  # fmt: skip
    assert stops("llama_3") == {2, 400, 401}


class Letters:
    """One token per character."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def test_a_stop_string_counts_where_it_is_sent_and_only_there() -> None:
    """A finished prompt may follow any format; in most "###" is a headline, not an end."""

    def answer(params: SamplingParams) -> str:
        output = OutputText(Letters(), params.stop)
        text = ""
        for character in "red### Human":
            text += output.append(ord(character))
            if output.stopped:
                return text
        return text + output.finish()

    assert answer(SamplingParams(stop=get_template("llava_v0").stop_strings)) == "red"
    assert answer(SamplingParams()) == "red### Human"
