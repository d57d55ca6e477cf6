"""The sampler draws from the distribution that the parameters describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.engine.messages import GenerationRequest
from models.engine.sampler import Sampler, uniform
from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import INVALID_TOKEN
from models.engine.sequence import Sequence
from models.errors import InvalidRequest
from tests.unit.engine.harness import LetterTokenizer

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])


def sequence(tokens: list[int] | None = None, **params: Any) -> Sequence:
    request = GenerationRequest("r", tokens or [0], (), SamplingParams(**params))
    return Sequence(request, LetterTokenizer(), 4, 64)


def draws(n: int = 4000, **params: Any) -> torch.Tensor:
    """Shares of each token over n seeds."""
    seqs = [sequence(seed=seed, **params) for seed in range(n)]
    tokens = Sampler().sample(LOGITS.repeat(n, 1), seqs).fetch().tokens
    return torch.bincount(torch.tensor(tokens), minlength=5) / n


def test_shares_follow_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        assert torch.allclose(draws(temperature=temperature), expected, atol=0.03)


def test_greedy_takes_the_likeliest() -> None:
    assert draws(50, temperature=0.0)[0] == 1
    assert draws(50, temperature=1.0, top_p=0.0)[0] == 1


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 1}, 1),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.01}, 1),
        ({"min_p": 0.3}, 2),
        ({"top_k": 3, "top_p": 0.99}, 3),
        ({"top_k": 100}, 5),
        ({"top_k": 10**30, "top_p": 0.7}, 2),
    ],
)
def test_filters_keep_the_likeliest_and_their_ratios(params: dict[str, Any], allowed: int) -> None:
    expected = LOGITS.softmax(-1)
    expected[allowed:] = 0
    assert torch.allclose(draws(temperature=1.0, **params), expected / expected.sum(), atol=0.03)


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    filters: list[dict[str, Any]] = [
        {}, {"top_k": 3}, {"temperature": 0.0}, {"top_p": 0.5}, {"min_p": 0.2},
        {"repetition_penalty": 1.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"logit_bias": {4: 3.0, 9: -100}}, {"min_tokens": 3, "stop_token_ids": [2]},
    ]  # fmt: skip
    kinds = [{**kind, "seed": seed} for seed in range(20) for kind in filters]
    logits = torch.randn(len(kinds), 50)
    seqs = [sequence([3, 7, 7], **kind) for kind in kinds]
    together = Sampler().sample(logits.clone(), seqs).fetch().tokens
    one_by_one = [
        Sampler().sample(logits[i : i + 1].clone(), [s]).fetch().tokens[0]
        for i, s in enumerate(seqs)
    ]
    assert together == one_by_one


def test_every_token_of_an_answer_is_drawn_anew() -> None:
    seq = sequence(seed=7)
    drawn = []
    for _ in range(64):
        drawn += Sampler().sample(torch.zeros(1, 10), [seq]).fetch().tokens
        seq.token_ids.append(drawn[-1])
    assert drawn == [int(10 * uniform(7, index)) for index in range(64)]
    assert len(set(drawn)) == 10


def test_the_penalty_follows_its_formula() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seqs = [sequence([0, 2, -200], temperature=0.0, repetition_penalty=1.3)]
    assert Sampler().sample(logits, seqs).fetch().tokens == [1]
    assert torch.allclose(logits, torch.tensor([[2.0 / 1.3, 1.9, -1.3, -1.1]]))


def test_rows_that_are_not_numbers_are_reported_and_spare_the_others() -> None:
    logits = torch.stack([LOGITS, torch.full((5,), float("nan")), LOGITS])
    logits[2, 3] = float("nan")
    tokens = (
        Sampler().sample(logits, [sequence(temperature=t) for t in (0.0, 0.0, 1.0)]).fetch().tokens
    )
    assert tokens == [0, INVALID_TOKEN, INVALID_TOKEN]


def test_uniform_numbers_are_uniform_and_reproducible() -> None:
    numbers = torch.tensor([uniform(seed, i) for seed in range(50) for i in range(100)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.std() - 0.2887) < 0.01
    assert uniform(7, 3) == uniform(7, 3) != uniform(7, 4)
    assert uniform(-1, 0) != uniform(1, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")), ("temperature", -1), ("temperature", "hot"),
        ("temperature", True), ("top_p", 1.5), ("top_p", None), ("top_k", 1.5), ("top_k", -2),
        ("min_p", 2), ("repetition_penalty", 0), ("max_new_tokens", -1), ("max_new_tokens", "5"),
        ("max_new_tokens", 5.0), ("stop", 3), ("stop", ["a", 1]), ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("seed", 1.5),
        ("temperature", float("inf")), ("temperature", 10**400), ("temperature", -(10**400)),
        ("top_p", float("nan")), ("top_p", 10**400), ("min_p", -0.1), ("min_p", float("nan")),
        ("repetition_penalty", float("inf")), ("repetition_penalty", None), ("top_k", True),
        ("stop", {"a": 1}), ("stop", ["x" * 1025]), ("stop", [None]), ("stop_token_ids", 5),
        ("stop_token_ids", None), ("stop_token_ids", "5"), ("stop_token_ids", [True]),
        ("seed", "5"), ("seed", True), ("presence_penalty", 2.1), ("presence_penalty", "1"),
        ("frequency_penalty", -2.1), ("frequency_penalty", float("nan")), ("min_tokens", -1),
        ("min_tokens", 1000), ("min_tokens", 1.0), ("logprobs", -1), ("logprobs", 21),
        ("logprobs", True), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101}),
        ("logit_bias", {"1": 1.0}), ("logit_bias", {1: None}), ("logit_bias", 5),
        ("logit_bias", dict.fromkeys(range(1025), 1)), ("guide", "json"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 250, "the value is not sent back at length"


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="###").stop == ("###",)  # type: ignore[arg-type]


def adjusted(
    logits: NDArray[np.float64], prompt: list[int], answer: list[int], params: SamplingParams
) -> NDArray[np.float64]:
    """The same by another hand: one row, token by token, in vLLM's order."""
    out = logits.astype(np.float64).copy()
    for token, bias in dict(params.logit_bias).items():
        out[token] += bias
    for token in range(len(out)):
        if token in prompt or token in answer:
            factor = params.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        times = answer.count(token)
        out[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    if len(answer) < params.min_tokens:
        out[list(params.stop_token_ids)] = -np.inf
        out[1] = -np.inf  # the end of sequence
    return out


NUMBERS = st.floats(-2, 2, width=16)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_biases_penalties_and_logprobs_are_those_of_the_formulas(data: st.DataObject) -> None:
    vocabulary, rows = 12, data.draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=6)
    seqs, expected = [], []
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = generator.normal(size=(rows, vocabulary)).astype(np.float32) * 3
    for row in range(rows):
        params = SamplingParams(
            temperature=0,
            repetition_penalty=data.draw(st.sampled_from([1.0, 0.7, 1.4])),
            presence_penalty=data.draw(NUMBERS),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.5, -1.5])),
            logit_bias=data.draw(
                st.dictionaries(st.integers(0, vocabulary - 1), st.floats(-100, 100, width=16))
            ),
            min_tokens=data.draw(st.integers(0, 4)),
            stop_token_ids=(5, 7),
            logprobs=data.draw(st.sampled_from([None, 0, 1, 4, 20])),
        )
        prompt, answer = [3, -200, *data.draw(tokens)], data.draw(tokens)
        seq = Sequence(GenerationRequest("r", prompt, (), params), LetterTokenizer(), 4, 64)
        seq.token_ids.extend(answer)
        seqs.append(seq)
        expected.append(adjusted(logits[row], prompt, answer, params))
    changed = torch.from_numpy(logits.copy())
    samples = Sampler({1}).sample(changed, seqs).fetch()
    np.testing.assert_allclose(changed.numpy(), np.array(expected), rtol=1e-4, atol=1e-4)
    assert samples.tokens == changed.argmax(dim=-1).tolist()
    for row, (seq, got) in enumerate(zip(seqs, samples.logprobs, strict=True)):
        asked = seq.params.logprobs
        assert (got is None) == (asked is None)
        if got is not None and asked is not None:
            raw = logits[row].astype(np.float64)  # before anything was changed
            raw -= np.log(np.exp(raw).sum())
            assert got.token_id == samples.tokens[row]
            assert got.logprob == pytest.approx(raw[got.token_id], abs=1e-5)
            best = np.argsort(-raw)[:asked]
            assert [token for token, _ in got.top] == best.tolist()
            assert [value for _, value in got.top] == pytest.approx(raw[best].tolist(), abs=1e-5)


def test_a_bias_and_min_tokens_decide_what_is_drawn() -> None:
    assert draws(200, temperature=1.0, logit_bias={4: 100})[4] == 1
    assert draws(200, temperature=1.0, logit_bias={0: -100})[0] == 0
    seqs = [sequence(seed=seed, min_tokens=1) for seed in range(200)]
    drawn = Sampler({0}).sample(LOGITS.repeat(200, 1), seqs).fetch().tokens
    assert 0 not in drawn and len(set(drawn)) > 2
