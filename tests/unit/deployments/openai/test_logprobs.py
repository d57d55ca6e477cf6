"""Log-probabilities of answers and of prompts, in OpenAI's forms and in vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from models import GenerationDelta, PromptToken, TokenLogprobs, Usage
from tests.unit.deployments.harness import (
    PROMPT_TOKENS,
    FakeEngine,
    engine_of,
    make_worker,
)
from tests.unit.deployments.openai.asking import (
    COMPLETIONS,
    about,
    image,
    post,
)  # fmt: skip


def with_logprobs() -> FakeEngine:
    tokens = (
        TokenLogprobs(ord("A"), -0.5, ((ord("A"), -0.5), (ord("B"), -1.5))),
        TokenLogprobs(0xC3, -float("inf"), ((ord("C"), -0.1), (ord("D"), -2.0))),
    )
    usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=2)
    return FakeEngine([
        GenerationDelta("r", "A", (tokens[0].token_id,), None, usage, logprobs=tokens[:1]),
        GenerationDelta("r", "", (tokens[1].token_id,), "length", usage, logprobs=tokens[1:]),
    ])  # fmt: skip


class TestLogprobs:
    async def test_of_a_chat_have_bytes(self) -> None:
        worker = make_worker(with_logprobs())
        answer = await post(worker, logprobs=True, top_logprobs=2)
        assert engine_of(worker).asked[0][2].logprobs == 2
        first, second = answer.json["choices"][0]["logprobs"]["content"]
        assert first == {
            "token": "A", "logprob": -0.5, "bytes": [65],
            "top_logprobs": [
                {"token": "A", "logprob": -0.5, "bytes": [65]},
                {"token": "B", "logprob": -1.5, "bytes": [66]},
            ],
        }  # fmt: skip
        assert second["bytes"] == [0xC3]
        assert second["logprob"] == -9999.0

    async def test_streamed_they_are_the_same(self) -> None:
        answer = await post(make_worker(with_logprobs()), logprobs=True, stream=True)
        parts = [event["choices"][0]["logprobs"] for event in answer.events]
        content = [token for part in parts if part for token in part["content"]]
        assert [token["token"] for token in content] == ["A", "\ufffd"]

    async def test_of_a_completion_are_lists(self) -> None:
        worker = make_worker(with_logprobs())
        answer = await post(worker, COMPLETIONS, prompt="a", logprobs=2)
        assert answer.json["choices"][0]["logprobs"] == {
            "tokens": ["A", "\ufffd"], "token_logprobs": [-0.5, -9999.0],
            "top_logprobs": [
                {"A": -0.5, "B": -1.5}, {"C": -0.1, "D": -2.0, "\ufffd": -9999.0},
            ],
            "text_offset": [0, 1],
        }  # fmt: skip

    async def test_zero_of_a_completion_are_the_chosen_tokens_own(self) -> None:
        script = GenerationDelta(
            "r", "A", (65,), "length", Usage(PROMPT_TOKENS, 1),
            logprobs=(TokenLogprobs(65, -0.5, ()),),
        )  # fmt: skip
        answer = await post(make_worker(FakeEngine([script])), COMPLETIONS, prompt="a", logprobs=0)
        assert answer.json["choices"][0]["logprobs"]["top_logprobs"] == [{"A": -0.5}]

    async def test_unasked_there_are_none(self) -> None:
        answer = await post(make_worker())
        assert answer.json["choices"][0]["logprobs"] is None


def with_prompt_logprobs(*, max_tokens: int = 2) -> FakeEngine:
    """Of the prompt "aé", behind a token of the tokenizer's own."""
    first, last = "é".encode()
    known = (
        PromptToken(256),
        PromptToken(ord("a"), -0.5, 1, ((ord("a"), -0.5), (ord("b"), -1.5))),
        PromptToken(first, -2.0, 3, ((ord("c"), -0.25), (last, -1.0))),
        PromptToken(last, -float("inf"), 200, ((ord("d"), -0.125), (0x80, -0.75))),
    )
    usage = Usage(prompt_tokens=4, completion_tokens=max_tokens)
    tokens = tuple(TokenLogprobs(ord(c), -0.5, ((ord(c), -0.5),)) for c in "XY"[:max_tokens])
    return FakeEngine([
        GenerationDelta("r", "", (), None, usage, prompt_logprobs=known),
        GenerationDelta("r", "XY"[:max_tokens], (), "length", usage, logprobs=tokens),
    ])  # fmt: skip


class TestLogprobsOfPrompts:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_echoed_they_are_before_those_of_the_answer(self, stream: bool) -> None:
        worker = make_worker(with_prompt_logprobs())
        answer = await post(
            worker, COMPLETIONS, prompt="aé", echo=True, logprobs=1, max_tokens=2, stream=stream
        )
        assert engine_of(worker).asked[0][2].prompt_logprobs == 1
        choices = [c for event in answer.events for c in event["choices"]] if stream else (
            answer.json["choices"]
        )  # fmt: skip
        assert "".join(choice["text"] for choice in choices) == "aéXY"
        logprobs = {
            name: [x for choice in choices for x in choice["logprobs"][name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        bad = "\ufffd"
        assert logprobs == {
            "tokens": ["<s>", "a", bad, bad, "X", "Y"],
            "token_logprobs": [None, -0.5, -2.0, -9999.0, -0.5, -0.5],
            "top_logprobs": [
                None, {"a": -0.5}, {"c": -0.25, bad: -2.0}, {"d": -0.125, bad: -9999.0},
                {"X": -0.5}, {"Y": -0.5},
            ],
            "text_offset": [0, 0, 1, 1, 2, 3],
        }  # fmt: skip
        assert all(type(offset) is int for offset in logprobs["text_offset"])

    async def test_a_prompt_alone(self) -> None:
        """What lm-evaluation-harness and others ask for, with ids for a prompt."""
        worker = make_worker(with_prompt_logprobs(max_tokens=0))
        answer = await post(
            worker, COMPLETIONS, prompt=[[256, *"aé".encode()]], echo=True, logprobs=2,
            max_tokens=0, temperature=0, seed=1234,
        )  # fmt: skip
        (choice,) = answer.json["choices"]
        assert choice["text"] == "aé"
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -2.0, -9999.0]
        # Two tokens that are written alike: the unlikely one does not pass for the likeliest.
        assert choice["logprobs"]["top_logprobs"][3] == {"d": -0.125, "\ufffd": -0.75}
        assert choice["finish_reason"] == "length"

    async def test_in_vllms_form(self) -> None:
        def entry(logprob: float, rank: int, token: str) -> dict[str, Any]:
            return {"logprob": logprob, "rank": rank, "decoded_token": token}

        expected = [
            None,
            {"97": entry(-0.5, 1, "a")},
            {"195": entry(-2.0, 3, "\ufffd"), "99": entry(-0.25, 1, "c")},
            {"169": entry(-9999.0, 200, "\ufffd"), "100": entry(-0.125, 1, "d")},
        ]
        worker = make_worker(with_prompt_logprobs())
        chat = (await post(worker, prompt_logprobs=1, n=2)).json
        assert chat["prompt_logprobs"] == expected
        assert {params.prompt_logprobs for _, _, params, _ in engine_of(worker).asked} == {1, None}
        assert chat["choices"][0]["logprobs"] is None
        worker = make_worker(with_prompt_logprobs())
        body = (await post(worker, COMPLETIONS, prompt=["aé"] * 2, prompt_logprobs=1)).json
        assert [choice["prompt_logprobs"] for choice in body["choices"]] == [expected] * 2
        assert all(choice["text"] == "XY" for choice in body["choices"])

    async def test_pictures_have_none(self) -> None:
        usage = Usage(prompt_tokens=3, completion_tokens=1)
        known = (PromptToken(256), PromptToken(), PromptToken(65, -1.0, 2, ()))
        script = [GenerationDelta("r", "X", (88,), "stop", usage, prompt_logprobs=known)]
        answer = await post(
            make_worker(FakeEngine(script)), messages=about(image()), prompt_logprobs=0
        )
        assert answer.json["prompt_logprobs"] == [
            None, None, {"65": {"logprob": -1.0, "rank": 2, "decoded_token": "A"}},
        ]  # fmt: skip

    async def test_unasked_there_are_none(self) -> None:
        assert "prompt_logprobs" not in (await post(make_worker())).json
        answer = await post(make_worker(), COMPLETIONS, prompt="a")
        assert "prompt_logprobs" not in answer.json["choices"][0]
