"""Log-probabilities of prompts: right, the same in any company, and given once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from models import Engine, PromptToken, SamplingParams, load_engine
from models.engine import prompt_scores
from models.engine.messages import GenerationDelta, GenerationRequest
from models.errors import EngineFault
from tests.tiny import write_tiny_vila
from tests.unit.engine.harness import (
    VOCAB,
    Picture,
    alone_deltas,
    build_core,
    decoder,
    request,
    run_all,
)

PICTURE = Picture(b"\x05", 6)
TEXT = "USER: What is in this image? ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vila(tmp_path_factory.mktemp("tiny") / "vila1.5-tiny", awq=False)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with load_engine(
        folder, precision="W16A16", device="cpu", dtype="float32", num_threads=1,
        max_num_batched_tokens=16, max_num_seqs=2,
    ) as engine:  # fmt: skip
        yield engine


def scores_of(deltas: list[GenerationDelta], request_id: str) -> tuple[PromptToken, ...]:
    """Those of the one delta that has them, which is the request's first."""
    own = [delta for delta in deltas if delta.request_id == request_id]
    assert all(not delta.prompt_logprobs for delta in own[1:])
    return own[0].prompt_logprobs


def near(got: tuple[PromptToken, ...], expected: tuple[PromptToken, ...]) -> None:
    """The same up to rounding; the likeliest tokens may change places within it."""
    assert [score.token_id for score in got] == [score.token_id for score in expected]
    for a, b in zip(got, expected, strict=True):
        assert (a.logprob is None) is (b.logprob is None)
        if a.logprob is not None:
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-3)


def test_they_are_those_of_transformers(folder: Path, engine: Engine) -> None:
    reference = LlamaForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
    ids = engine.encode(TEXT)
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(dim=-1)
    params = SamplingParams(temperature=1, max_new_tokens=3, prompt_logprobs=4, ignore_eos=True)
    scores = next(iter(engine.generate(TEXT, params=params))).prompt_logprobs
    assert len(ids) > 16  # several chunks
    assert scores[0] == PromptToken(ids[0])
    assert [score.token_id for score in scores] == ids
    for row, token, score in zip(expected, ids[1:], scores[1:], strict=False):
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert score.rank == int((row > row[token]).sum()) + 1
        assert [i for i, _ in score.top] == row.topk(4).indices.tolist()
        assert [v for _, v in score.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


async def test_a_prompt_alone_can_be_scored(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    (delta,) = [delta async for delta in engine.stream(TEXT, params=params)]
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (), "length")
    assert delta.usage.completion_tokens == 0
    assert len(delta.prompt_logprobs) == delta.usage.prompt_tokens
    assert all(score.top == () for score in delta.prompt_logprobs)
    whole = SamplingParams(max_new_tokens=4, prompt_logprobs=0)
    near(delta.prompt_logprobs, next(iter(engine.generate(TEXT, params=whole))).prompt_logprobs)
    assert engine.generate_batch([(TEXT, [])], params) == [""]


def test_each_is_what_the_model_says_of_a_next_token() -> None:
    """A picture among them, whose positions have none."""
    req = request("r", range(20, 45), [(3, PICTURE)], prompt_logprobs=2)
    scores = scores_of(alone_deltas(req), "r")
    assert [at for at, score in enumerate(scores) if score == PromptToken()] == list(range(3, 9))
    for at in [1, 2, 9, 10, 24]:
        token = req.token_ids[at]
        before = request(
            "b", req.token_ids[:at], [(3, PICTURE)] if at >= 9 else [], max_new_tokens=1,
            logit_bias={token: 100}, logprobs=2,
        )  # fmt: skip
        (delta,) = alone_deltas(before)
        assert delta.token_ids == (scores[at].token_id,) == (token,)
        assert scores[at].logprob == pytest.approx(delta.logprobs[0].logprob, abs=1e-4)
        assert [i for i, _ in scores[at].top] == [i for i, _ in delta.logprobs[0].top]


@st.composite
def requests(draw: st.DrawFn, name: str) -> GenerationRequest:
    length = draw(st.integers(1, 40))
    family = draw(st.integers(0, 1))
    tokens = [2 + (family * 7 + i * (family + 3)) % (VOCAB - 2) for i in range(length)]
    pictures = [(draw(st.sampled_from([0, 2])), PICTURE)] if length > 12 else []
    params: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(0, 12)),
        "prompt_logprobs": draw(st.sampled_from([0, 0, 3, None])),
        "ignore_eos": True,
    }
    if params["prompt_logprobs"] is None:
        params["max_new_tokens"] += 1
    return request(name, tokens, pictures if draw(st.booleans()) else [], **params)


@settings(max_examples=25)
@given(st.data())
def test_they_are_the_same_in_any_company(data: st.DataObject) -> None:
    """Random chunks, preemptions, aborts and hits of the prefix cache, in a pool that is too small
    for all."""
    coming = [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(1, 6)))]
    core = build_core(
        blocks=data.draw(st.integers(14, 24), "blocks"),
        seqs=data.draw(st.integers(1, 4), "seqs"),
        budget=data.draw(st.integers(1, 32), "budget"),
        caching=data.draw(st.booleans(), "caching"),
        async_scheduling=data.draw(st.booleans(), "async"),
    )
    waiting = list(coming)
    aborted: set[str] = set()
    deltas: list[GenerationDelta] = []
    while waiting or core.has_work:
        if waiting and (not core.has_work or data.draw(st.booleans(), "arrival")):
            core.add(waiting.pop(0))
        if data.draw(st.integers(0, 15), "abort") == 0:
            victim = data.draw(st.sampled_from(coming)).request_id
            aborted |= {delta.request_id for delta in core.abort(victim)}
        deltas += core.step()
        core.check_integrity()
    core.check_idle()
    seen = {delta.request_id for delta in deltas}
    for req in coming:
        if req.request_id in seen:
            near(scores_of(deltas, req.request_id), alone_deltas(req)[0].prompt_logprobs)
        else:
            assert req.request_id in aborted


def test_what_a_preempted_request_knows_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    scores_of_rows = prompt_scores.scores_of

    def counting(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[PromptToken]:
        rows.append(len(tokens))
        return scores_of_rows(logits, tokens, num_top)

    monkeypatch.setattr(prompt_scores, "scores_of", counting)
    core = build_core(blocks=20, seqs=4, budget=16)
    reqs = [
        request(
            f"r{i}", range(2 + i, 22 + i), max_new_tokens=25, ignore_eos=True, prompt_logprobs=1
        )
        for i in range(4)
    ]
    for req in reqs:
        core.add(req)
    deltas = run_all(core)
    assert core.stats().num_preemptions > 0
    assert sum(rows) == 4 * 19
    for req in reqs:
        near(scores_of(deltas, req.request_id), scores_of(alone_deltas(req), req.request_id))


def test_a_long_prompt_is_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "ROWS_AT_A_TIME", 5)
    sizes: list[int] = []
    core = build_core(budget=64, seqs=1)
    logits = core.runner.decoder.logits
    monkeypatch.setattr(
        core.runner.decoder, "logits", lambda rows: sizes.append(len(rows)) or logits(rows)
    )
    core.add(request("r", range(3, 40), max_new_tokens=2, prompt_logprobs=2, ignore_eos=True))
    run_all(core)
    assert sizes == [5] * 7 + [1] + [1] + [1]  # the prompt's 36, and two tokens of the answer


def test_a_known_prompt_is_computed_for_those_who_ask_and_no_others() -> None:
    core = build_core()
    prompt = range(5, 35)
    core.add(request("first", prompt))
    run_all(core)
    core.add(request("second", prompt, prompt_logprobs=1))
    core.add(request("third", prompt))
    deltas = run_all(core)
    cached = {delta.request_id: delta.usage.cached_tokens for delta in deltas}
    assert cached == {"second": 0, "third": 28}
    assert len(scores_of(deltas, "second")) == 30
    assert scores_of(deltas, "third") == ()


def test_what_is_not_a_number_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = decoder().logits

    def broken(rows: torch.Tensor) -> torch.Tensor:
        return logits(rows) if len(rows) == 1 else logits(rows) * math.nan

    core = build_core(budget=64)
    monkeypatch.setattr(core.runner.decoder, "logits", broken)
    core.add(request("r", range(5, 25), prompt_logprobs=1))
    (delta,) = run_all(core)
    assert isinstance(delta.error, EngineFault)
