"""Bodies of the OpenAI routes: what each field becomes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.openai.request import ChatRequest, CompletionRequest, OpenAILimits, Options
from models import Guide, SamplingParams
from models.errors import InvalidRequest
from tests.unit.deployments.harness import outcome

LIMITS = OpenAILimits(max_tokens=100, max_choices=8, max_images=2, max_prompt_chars=1000)
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def chat(**more: Any) -> Options:
    return ChatRequest.parse({"messages": HI, **more}, LIMITS).options


def complete(**more: Any) -> CompletionRequest:
    return CompletionRequest.parse({"prompt": "hi", **more}, LIMITS)


def refused_field(parse: Any, **more: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(**more)
    return caught.value.field


def test_defaults_are_vllms() -> None:
    options = chat()
    assert options == Options(model="", params=SamplingParams(max_new_tokens=100))
    assert complete().options.params == SamplingParams(max_new_tokens=16)


def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    names = ("model", "temperature", "n", "stop", "stream", "stream_options", "logit_bias", "tools",
             "response_format", "max_tokens", "logprobs", "top_logprobs", "seed")  # fmt: skip
    assert chat(**dict.fromkeys(names), user="me", metadata={}, parallel_tool_calls=True) == chat()


def test_every_sampling_field_arrives() -> None:
    params = chat(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-3, min_tokens=2,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.2, max_tokens=7,
        stop=["a", "b"], stop_token_ids=[3], logit_bias={"5": -100, "6": 1.5}, ignore_eos=True,
        logprobs=True, top_logprobs=4,
    ).params  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-3, min_tokens=2,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.2, max_new_tokens=7,
        stop=("a", "b"), stop_token_ids=(3,), logit_bias={5: -100, 6: 1.5}, ignore_eos=True,
        logprobs=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({"max_tokens": 7}, 7), ({"max_completion_tokens": 7}, 7), ({"max_tokens": 1000}, 100),
     ({"max_tokens": 5, "max_completion_tokens": 7}, 7), ({"max_tokens": 7.0}, 7)],
)  # fmt: skip
def test_max_tokens_by_either_name_capped(fields: dict[str, Any], tokens: int) -> None:
    assert chat(**fields).params.max_new_tokens == tokens


def test_logprobs_have_two_forms() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).params.logprobs is None
    assert complete(logprobs=3).options.params.logprobs == 3


def test_stream_options() -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    options = chat(stream=True, stream_options=usage)
    assert (options.stream, options.include_usage, options.continuous_usage) == (True, True, True)
    options = chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert (options.include_usage, options.continuous_usage) == (False, False)


@pytest.mark.parametrize(
    ("fields", "guide", "field"),
    [
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": {"type": "json_object"}}, Guide("json_object"), "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Guide("json_schema", json.dumps(SCHEMA)), "response_format",
        ),
        ({"guided_json": SCHEMA}, Guide("json_schema", json.dumps(SCHEMA)), "guided_json"),
        ({"guided_json": '{"type": "object"}'}, Guide("json_schema", '{"type": "object"}'),
         "guided_json"),
        ({"guided_regex": "a|b"}, Guide("regex", "a|b"), "guided_regex"),
        ({"guided_choice": ["a", "b"]}, Guide("choice", '["a", "b"]'), "guided_choice"),
        ({"structured_outputs": {"json": SCHEMA}}, Guide("json_schema", json.dumps(SCHEMA)),
         "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}}, Guide("regex", "a"), "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"], "json": None}}, Guide("choice", '["a"]'),
         "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": True}}, Guide("json_object"),
         "structured_outputs.json_object"),
    ],
)  # fmt: skip
def test_forms_have_many_names(fields: dict[str, Any], guide: Guide | None, field: str) -> None:
    options = chat(**fields)
    assert (options.params.guide, options.guide_field) == (guide, field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
         "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_grammar": "root"}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "root"}}, "structured_outputs.grammar"),
        ({"guided_choice": []}, "guided_choice"), ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"), ({"guided_regex": 1}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "(" * 100}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)  # fmt: skip
def test_a_wrong_form_is_refused_by_the_name_it_was_sent_under(
    fields: dict[str, Any], field: str
) -> None:
    assert refused_field(chat, **fields) == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": "hot"}, "temperature"), ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"top_p": 2}, "top_p"),
        ({"top_k": 1.5}, "top_k"), ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"),
        ({"seed": 1 << 70}, "seed"), ({"seed": "1"}, "seed"), ({"seed": True}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": "7"}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n"), ({"n": 9}, "n"), ({"n": "2"}, "n"), ({"best_of": 3}, "best_of"),
        ({"stop": 5}, "stop"), ({"stop": [5]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": "1"}, "stop_token_ids"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"1": 200}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"), ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"ignore_eos": "yes"}, "ignore_eos"), ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"), ({"model": 5}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": None}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{}], "tool_choice": "auto"}, "tools"), ({"functions": [{}]}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"), ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_chat_is_named(fields: dict[str, Any], field: str) -> None:
    assert refused_field(chat, **fields) == field


def test_tools_that_must_not_be_called_are_no_harm() -> None:
    assert chat(tools=[{"type": "function"}], tool_choice="none") == chat(tools=[])


def test_prompts_of_a_completion() -> None:
    assert complete().prompts == ("hi",)
    assert complete(prompt=["a", "b"], n=4).prompts == ("a", "b")
    assert complete(prompt=[1, 2.0]).prompts == ((1, 2),)
    assert complete(prompt=[[1, 2], [3]]).prompts == ((1, 2), (3,))
    assert complete(prompt=["a", [3]]).prompts == ("a", (3,))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"), ({"prompt": {}}, "prompt"),
        ({"prompt": [1.5]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": [1] * 1001}, "prompt"), ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": "what is <image>"}, "prompt"), ({"prompt": "a" * 1001}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt"), ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 21}, "logprobs"), ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logprobs": True}, "logprobs"), ({"max_tokens": -1}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_completion_is_named(fields: dict[str, Any], field: str) -> None:
    assert refused_field(complete, **fields) == field


def test_log_probabilities_of_a_prompt_are_computed_where_they_are_told() -> None:
    def asked(**body: Any) -> tuple[int | None, int | None, int | None]:
        options = complete(**body).options
        return options.params.prompt_logprobs, options.params.logprobs, options.prompt_logprobs

    assert asked(logprobs=1) == (None, 1, None)
    assert asked(echo=True) == (None, None, None)
    assert asked(echo=True, logprobs=0) == (0, 0, None)
    assert asked(prompt_logprobs=3) == (3, None, 3)
    assert asked(prompt_logprobs=3, echo=True, logprobs=5, max_tokens=0) == (5, 5, 3)
    assert chat(prompt_logprobs=2).params.prompt_logprobs == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "messages", "prompt", "n", "stop", "stream", "stream_options", "logit_bias", "tools", "model",
    "response_format", "structured_outputs", "guided_json", "max_tokens", "logprobs", "seed",
    "temperature", "top_logprobs", "prompt_logprobs", "echo", "best_of", "chat_template_kwargs",
)  # fmt: skip


@settings(max_examples=150)
@given(JSON | st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_json_is_a_request_or_is_refused_in_words(body: Any) -> None:
    if isinstance(body, dict) and "messages" not in body:
        body = {**body, "messages": HI}
    outcome(lambda: ChatRequest.parse(body, LIMITS))
    outcome(lambda: CompletionRequest.parse(body, LIMITS))
