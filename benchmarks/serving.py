"""A worker over HTTP against the bare engine, and against transformers' `generate`.

    python -m benchmarks.serving --streams 1 8 --repeats 3

Starts the worker by itself, on a free port, asks all of them in turn, and prints a table and the
goals; the status is 1 if one of them is missed. The defaults take some ten minutes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arm import Arm
from benchmarks.command import build_parser, plan_of
from benchmarks.comparison import Plan, Results, compare
from benchmarks.engine import engine_arm, transformers_arms
from benchmarks.goals import HTTP, goals_of, memory_goal, start_goal
from benchmarks.http_arm import HttpArm
from benchmarks.load import make_questions
from benchmarks.report import print_goals, print_table, write_record
from benchmarks.worker import Way, Worker


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        start_s: from the worker's command to the first token of its first answer.
        memory_bytes: of all of its processes, after the load.
    """

    results: Results
    start_s: float
    memory_bytes: int


async def measure(way: Way, model_path: str, others: Sequence[Arm], plan: Plan) -> Outcome:
    """Starts the worker while nothing else runs, then the other arms, and compares."""
    http = HttpArm(HTTP[way], Worker(way, model_path, max(plan.streams)))
    arms = [*others, http]
    try:
        await http.start()
        (first,) = await http.ask(make_questions(-100, 1), plan.tokens)
        start_s = first.arrivals[0][0] - http.worker.started
        for arm in others:
            await arm.start()
        results = await compare(arms, plan)
        return Outcome(results, start_s, http.worker.memory_bytes())
    finally:
        for arm in arms:
            await arm.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser("python -m benchmarks.serving", __doc__)
    parser.add_argument(
        "--way", choices=list(HTTP), default="launcher", help="how the worker is started"
    )
    parser.add_argument(
        "--transformers", action="store_true", help="run transformers' generate beside them"
    )
    options = parser.parse_args(arguments)
    others = [engine_arm(options.model_path, max(options.streams))]
    if options.transformers:
        others += transformers_arms(options.model_path)
    outcome = asyncio.run(measure(options.way, options.model_path, others, plan_of(options)))
    goals = [
        *goals_of(outcome.results),
        start_goal(options.way, outcome.start_s),
        memory_goal(options.way, outcome.memory_bytes),
    ]
    print_table(outcome.results)
    print_goals(goals)
    if options.record:
        name = Path(options.model_path).name
        write_record(
            options.record, name, outcome.results, goals, note=options.note, way=options.way,
            start_s=round(outcome.start_s, 2), memory_gb=round(outcome.memory_bytes / 1e9, 3),
        )  # fmt: skip
    return 0 if all(goal.is_met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
