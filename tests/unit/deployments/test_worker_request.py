"""`WorkerRequest.parse`: every field of the protocol, and whatever else clients may send."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.worker_request import RequestLimits, WorkerRequest
from models import SamplingParams
from models.errors import InvalidRequest
from tests.unit.deployments.harness import outcome

LIMITS = RequestLimits(
    default_max_new_tokens=256, max_new_tokens_cap=1024, max_images=3, max_prompt_chars=1000
)
HUGE = pytest.param(10**5000, id="huge")
"""More digits than Python writes out; not pytest's names of tests either."""
HUGE_NEGATIVE = pytest.param(-(10**5000), id="-huge")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
INTEGERS = ("top_k", "seed", "max_new_tokens", "max_tokens")
FIELDS = (
    *NUMBERS, *INTEGERS, "prompt", "images", "stop", "stop_token_ids", "ignore_eos", "echo",
)  # fmt: skip


def parse(**fields: Any) -> WorkerRequest:
    return WorkerRequest.parse({"prompt": "hi", **fields}, LIMITS)


def refusal(field: str | None = None, /, **fields: Any) -> str:
    """The message, which must name the field: the one that was given, unless said otherwise."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.field == (field or next(iter(fields)))
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_a_prompt_alone_gets_the_protocols_defaults() -> None:
    request = parse()
    assert request == WorkerRequest("hi", (), SamplingParams(), echo=True)
    params = request.params
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, -1)
    assert (params.repetition_penalty, params.max_new_tokens) == (1.0, 256)
    assert (params.stop, params.stop_token_ids, params.seed) == ((), (), None)
    assert params.ignore_eos is False


def test_every_field_is_understood() -> None:
    request = parse(
        prompt="<image> and <image>",
        images=["QUJD", "data:image/png;base64,QUJD"],
        temperature=0.2,
        top_p=0.7,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=64,
        stop=["</s>", "###"],
        stop_token_ids=[2, 32000],
        seed=7,
        ignore_eos=True,
        echo=False,
    )
    assert request.prompt == "<image> and <image>"
    assert request.images == ("QUJD", "data:image/png;base64,QUJD")
    assert request.echo is False
    assert request.params == SamplingParams(
        temperature=0.2, top_p=0.7, top_k=40, min_p=0.05, repetition_penalty=1.1,
        max_new_tokens=64, stop=("</s>", "###"), stop_token_ids=(2, 32000), seed=7,
        ignore_eos=True,
    )  # fmt: skip


def test_what_tinychats_web_client_sends_is_understood() -> None:
    request = parse(
        model="VILA1.5-3b-AWQ-4bit-AWQ", prompt="USER: <image> What? ASSISTANT:",
        temperature=0.2, top_p=1, max_new_tokens=512, stop="</s>", images=["QUJD"],
    )  # fmt: skip
    assert (request.params.stop, request.params.max_new_tokens) == (("</s>",), 512)


def test_what_holohubs_client_sends_is_understood() -> None:
    """No model, a list of stops, another name for the length, and keys of another server."""
    request = parse(
        prompt="<image>", images=["QUJD"], temperature=0.7, max_tokens=100, stop=["</s>"],
        n_keep=-1, stream=True,
    )  # fmt: skip
    assert (request.params.stop, request.params.max_new_tokens) == (("</s>",), 100)


@pytest.mark.parametrize("value", ["x", 0, [], {}, math.nan, [[[[]]]]])
def test_unknown_keys_are_ignored_whatever_they_hold(value: object) -> None:
    assert parse(model=value, stream=value, logprobs=value, best_of=value, ä=value) == parse()


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "prompt"])
def test_null_means_absent(name: str) -> None:
    assert parse(**{name: None}) == parse()


def test_a_prompt_must_be_there_and_a_string() -> None:
    assert "missing" in refusal(prompt=None)
    with pytest.raises(InvalidRequest, match=r"prompt: is missing"):
        WorkerRequest.parse({}, LIMITS)
    for value in (5, True, ["hi"], {"text": "hi"}):
        assert "must be a string" in refusal(prompt=value)


@pytest.mark.parametrize("prompt", ["", " ", "\0", "猫\n\t\u200d\U0001f468\U0001f3fd", "x" * 1000])
def test_a_prompt_is_kept_as_it_is(prompt: str) -> None:
    assert parse(prompt=prompt).prompt == prompt


def test_a_prompt_that_can_never_fit_is_refused_untokenised() -> None:
    assert "1001 characters" in refusal(prompt="x" * 1001)


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert "surrogate" in refusal(prompt="hi \ud83d")


@pytest.mark.parametrize("body", [None, True, 5, 1.5, "prompt", [], [{"prompt": "hi"}]])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object") as caught:
        WorkerRequest.parse(body, LIMITS)
    assert caught.value.field == "body"


class TestImages:
    @pytest.mark.parametrize(
        ("prompt", "images"),
        [("hi", ["QUJD"]), ("<image>", []), ("<image>", None), ("<image><image>", ["QUJD"])],
    )
    def test_there_must_be_one_for_each_placeholder(
        self, prompt: str, images: list[str] | None
    ) -> None:
        """A placeholder without a picture would reach the embedding as an id of -200."""
        message = refusal("images", prompt=prompt, images=images)
        assert f"{len(images or [])} in `images`" in message
        assert f"{prompt.count('<image>')} <image>" in message

    def test_an_empty_list_is_none_at_all(self) -> None:
        assert parse(images=[]).images == ()

    @pytest.mark.parametrize("value", ["QUJD", 5, True, {"0": "QUJD"}])
    def test_they_must_be_a_list(self, value: object) -> None:
        assert "must be a list" in refusal("images", prompt="<image>", images=value)

    @pytest.mark.parametrize("value", [None, 5, ["QUJD"], {"url": "QUJD"}])
    def test_each_must_be_a_string_and_is_named_by_its_index(self, value: object) -> None:
        assert "base64" in refusal("images[1]", prompt="<image>" * 2, images=["QUJD", value])

    def test_there_may_not_be_too_many(self) -> None:
        assert len(parse(prompt="<image>" * 3, images=["QUJD"] * 3).images) == 3
        assert "at most 3" in refusal("images", prompt="<image>" * 4, images=["QUJD"] * 4)


class TestNumbers:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", ["0.5", "", True, False, [0.5], {"v": 1}])
    def test_a_number_must_be_a_number(self, name: str, value: object) -> None:
        assert "must be a number" in refusal(**{name: value})

    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, HUGE, HUGE_NEGATIVE])
    def test_a_number_must_be_finite(self, name: str, value: float) -> None:
        assert "not a finite number" in refusal(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -0.1), ("top_p", -0.1), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2),
            ("repetition_penalty", 0), ("repetition_penalty", -1), ("top_k", -2),
            ("stop_token_ids", [-1]), ("max_new_tokens", -1), ("max_tokens", -1),
            ("max_new_tokens", 1 << 31),
        ],
    )  # fmt: skip
    def test_a_number_must_be_in_its_range(self, name: str, value: object) -> None:
        assert "out of range" in refusal(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("temperature", 0), ("temperature", 100), ("top_p", 0), ("top_p", 1), ("top_k", -1),
         ("top_k", 0), ("min_p", 1), ("seed", -1), ("seed", (1 << 63) - 1)],
    )  # fmt: skip
    def test_the_ends_of_a_range_belong_to_it(self, name: str, value: float) -> None:
        assert getattr(parse(**{name: value}).params, name) == value

    @pytest.mark.parametrize("name", INTEGERS)
    @pytest.mark.parametrize("value", ["64", 1.5, True, [64], {}, math.nan, math.inf])
    def test_an_integer_must_be_one(self, name: str, value: object) -> None:
        assert "not an integer" in refusal(**{name: value})

    @pytest.mark.parametrize("name", INTEGERS)
    @pytest.mark.parametrize("value", [1 << 63, 10**30, HUGE, HUGE_NEGATIVE, 1e300])
    def test_an_integer_of_any_length_is_refused_by_name(self, name: str, value: float) -> None:
        assert "out of range" in refusal(**{name: value})

    @pytest.mark.parametrize("name", INTEGERS)
    def test_javascripts_64_point_0_is_an_integer(self, name: str) -> None:
        assert parse(**{name: 64.0}) == parse(**{name: 64})

    def test_only_true_ignores_the_end_of_sequence(self) -> None:
        assert parse(ignore_eos=True).params.ignore_eos
        assert not parse(ignore_eos="yes").params.ignore_eos


class TestMaxNewTokens:
    @pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
    def test_it_is_lowered_to_the_cap_without_complaint(self, name: str) -> None:
        assert parse(**{name: 1536}).params.max_new_tokens == 1024
        assert parse(**{name: 1024}).params.max_new_tokens == 1024
        assert parse(**{name: (1 << 31) - 1}).params.max_new_tokens == 1024

    @pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
    def test_none_at_all_is_allowed(self, name: str) -> None:
        """The web client's slider goes down to 0."""
        assert parse(**{name: 0}).params.max_new_tokens == 0

    def test_its_own_name_comes_before_the_alias(self) -> None:
        assert parse(max_new_tokens=5, max_tokens=6).params.max_new_tokens == 5
        assert parse(max_new_tokens=0, max_tokens=6).params.max_new_tokens == 0
        assert parse(max_new_tokens=None, max_tokens=6).params.max_new_tokens == 6


class TestStop:
    @pytest.mark.parametrize(
        ("stop", "kept"),
        [
            ("</s>", ("</s>",)), ("###", ("###",)), ("", ()), ([], ()), ([""], ()),
            (["</s>", "", "###"], ("</s>", "###")), ("猫", ("猫",)),
        ],
    )  # fmt: skip
    def test_it_is_a_string_or_a_list(self, stop: object, kept: tuple[str, ...]) -> None:
        assert parse(stop=stop).params.stop == kept

    @pytest.mark.parametrize("stop", [5, True, {"a": 1}, [5], ["</s>", None], [["</s>"]]])
    def test_it_is_nothing_else(self, stop: object) -> None:
        assert "must be a string or a list of strings" in refusal(stop=stop)

    def test_there_may_not_be_too_many_or_too_long(self) -> None:
        refusal(stop=["x"] * 17)
        refusal(stop="x" * 1025)

    @pytest.mark.parametrize("value", [[2, "3"], [True], [2.5], [None], [[2]], [10**5000]])
    def test_stop_tokens_are_integers(self, value: object) -> None:
        refusal(stop_token_ids=value)

    @pytest.mark.parametrize("value", [2, "2", {"2": 2}, True])
    def test_stop_tokens_are_a_list(self, value: object) -> None:
        assert "must be a list" in refusal(stop_token_ids=value)


@pytest.mark.parametrize(
    ("value", "echo"), [(True, True), (False, False), (0, True), ("false", True), ([], True)]
)
def test_only_false_itself_turns_the_echo_off(value: object, echo: bool) -> None:
    """Clients cut the prompt's length off the text; to drop the echo by mistake eats the answer."""
    assert parse(echo=value).echo is echo


def nested(depth: int) -> object:
    value: object = 10**5000
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [nested(1), nested(10_000), {"a": nested(10_000)}])
def test_a_value_is_not_written_out_where_that_would_fail(name: str, value: object) -> None:
    """Not every value that can be parsed can be shown: digits and depth have limits."""
    found = outcome(lambda: parse(**{name: value}))
    assert not isinstance(found, InvalidRequest) or name in found.field


def test_a_message_quotes_no_more_than_the_beginning_of_a_value() -> None:
    assert len(refusal(top_k="x" * 1_000_000)) < 120
    assert len(refusal(stop=[{"x" * 1_000_000: 1}])) < 120


NUMBER = (
    st.integers() | st.floats() | st.integers(-3, 3) | st.floats(-1, 2)
    | st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, 10**400, -(10**400)])
)  # fmt: skip
TEXT = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(["<image>", "</s>"])
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS) | TEXT, VALUE, max_size=8), VALUE)
def test_anything_is_either_parsed_or_refused_by_name(fields: dict[str, Any], body: object) -> None:
    for candidate in (fields, {"prompt": "hi", **fields}, body):
        found = outcome(partial(WorkerRequest.parse, candidate, LIMITS))
        if isinstance(found, WorkerRequest):
            assert isinstance(candidate, dict)
            assert found.prompt == candidate["prompt"]
            assert len(found.images) == found.prompt.count("<image>") <= 3
            assert 0 <= found.params.max_new_tokens <= 1024
            assert all(map(math.isfinite, (found.params.temperature, found.params.top_p)))
