"""The sampler draws from the distribution that the parameters describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    tokens = Sampler().sample(LOGITS.repeat(n, 1), seqs)
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
        {"repetition_penalty": 1.5},
    ]  # fmt: skip
    kinds = [{**kind, "seed": seed} for seed in range(20) for kind in filters]
    logits = torch.randn(len(kinds), 50)
    seqs = [sequence([3, 7, 7], **kind) for kind in kinds]
    together = Sampler().sample(logits.clone(), seqs)
    one_by_one = [Sampler().sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(seqs)]
    assert together == one_by_one


def test_every_token_of_an_answer_is_drawn_anew() -> None:
    seq = sequence(seed=7)
    drawn = []
    for _ in range(64):
        drawn += Sampler().sample(torch.zeros(1, 10), [seq])
        seq.token_ids.append(drawn[-1])
    assert drawn == [int(10 * uniform(7, index)) for index in range(64)]
    assert len(set(drawn)) == 10


def test_the_penalty_follows_its_formula() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seqs = [sequence([0, 2, -200], temperature=0.0, repetition_penalty=1.3)]
    assert Sampler().sample(logits, seqs) == [1]
    assert torch.allclose(logits, torch.tensor([[2.0 / 1.3, 1.9, -1.3, -1.1]]))


def test_rows_that_are_not_numbers_are_reported_and_spare_the_others() -> None:
    logits = torch.stack([LOGITS, torch.full((5,), float("nan")), LOGITS])
    logits[2, 3] = float("nan")
    tokens = Sampler().sample(logits, [sequence(temperature=t) for t in (0.0, 0.0, 1.0)])
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
        ("seed", "5"), ("seed", True),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 250, "the value is not sent back at length"


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="###").stop == ("###",)  # type: ignore[arg-type]
