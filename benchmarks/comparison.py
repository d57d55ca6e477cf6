"""Asks all arms the same questions, in turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.arm import Arm
from benchmarks.load import Answer, Round, make_questions
from benchmarks.machine import busy_cpus

WARM_UP = (1, 4)
"""Streams, before anything counts."""


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        streams: how many questions are asked at a time.
        tokens: of every answer.
        repeats: rounds of each arm and number of streams; medians over them are reported.
        same_picture: ask about one picture only.
    """

    streams: Sequence[int]
    tokens: int
    repeats: int
    same_picture: bool = False


@dataclass
class Results:
    """
    Attributes:
        rounds: by arm and number of streams, in the order in which they were run.
        busy_before, busy_after: CPUs that were busy while nothing was asked.
    """

    plan: Plan
    rounds: dict[str, dict[int, list[Round]]] = field(default_factory=dict)
    busy_before: float = 0.0
    busy_after: float = 0.0

    @property
    def arms(self) -> list[str]:
        return list(self.rounds)

    def median(self, arm: str, streams: int, figure: str) -> float:
        return median(getattr(one, figure) for one in self.rounds[arm][streams])

    def ratio(self, arm: str, other: str, streams: int, figure: str = "tokens_per_s") -> float:
        """The median over the repeats of arm / other: what slows the machine slows both."""
        pairs = zip(self.rounds[arm][streams], self.rounds[other][streams], strict=True)
        return median(getattr(one, figure) / getattr(two, figure) for one, two in pairs)

    def growth(self, arm: str, streams: int, base: int = 1) -> float:
        """The median over the repeats of tokens/s at `streams` / at `base`."""
        pairs = zip(self.rounds[arm][streams], self.rounds[arm][base], strict=True)
        return median(many.tokens_per_s / one.tokens_per_s for many, one in pairs)

    def as_json(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "busy_cpus_before": self.busy_before,
            "busy_cpus_after": self.busy_after,
            "medians": {
                arm: {
                    str(streams): {
                        figure: round(self.median(arm, streams, figure), 5)
                        for figure in asdict(rounds[0])
                    }
                    for streams, rounds in by_streams.items()
                }
                for arm, by_streams in self.rounds.items()
            },
            "rounds": {
                arm: {
                    str(streams): [_rounded(asdict(one)) for one in rounds]
                    for streams, rounds in by_streams.items()
                }
                for arm, by_streams in self.rounds.items()
            },
        }


async def compare(arms: Sequence[Arm], plan: Plan) -> Results:
    """Every repeat goes through all numbers of streams, and there through all arms, each time
    another one first. All arms are kept running, so all share what idle ones cost."""
    results = Results(plan, {arm.name: {n: [] for n in plan.streams} for arm in arms})
    for arm in arms:
        for count in WARM_UP:
            await arm.ask(make_questions(-count, count), plan.tokens)
    results.busy_before = busy_cpus()
    asked, turn = 0, 0
    bar = tqdm(total=plan.repeats * len(plan.streams) * len(arms), unit="round")
    for _ in range(plan.repeats):
        for count in plan.streams:
            questions = make_questions(asked, count, same_picture=plan.same_picture)
            for arm in _rotated(arms, turn):
                answers: list[Answer] = await arm.ask(questions, plan.tokens)
                results.rounds[arm.name][count].append(Round.of(answers))
                bar.update()
            asked, turn = asked + count, turn + 1
    bar.close()
    results.busy_after = busy_cpus()
    return results


async def run(arms: Sequence[Arm], plan: Plan) -> Results:
    """`compare`, with the arms started and closed."""
    async with AsyncExitStack() as stack:
        for arm in arms:
            stack.push_async_callback(arm.close)
            await arm.start()
        return await compare(arms, plan)


def _rotated(arms: Sequence[Arm], turn: int) -> Iterable[Arm]:
    first = turn % len(arms)
    return [*arms[first:], *arms[:first]]


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in figures.items()}
