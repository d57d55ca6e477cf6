"""The engine against transformers' `generate`: tokens per second and times to the first token.

    python -m benchmarks.engine --streams 1 8 --repeats 3

Picture questions to the demo model, asked of each in turn. A table, and the goals; the status is 1
if one of them is missed. The defaults take some ten minutes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arm import Arm
from benchmarks.command import build_parser, plan_of
from benchmarks.comparison import run
from benchmarks.goals import BATCHED, ENGINE, TRANSFORMERS, goals_of
from benchmarks.piped_arm import PipedArm
from benchmarks.report import print_goals, print_table, write_record


def engine_arm(model_path: str, max_num_seqs: int, options: Mapping[str, Any] | None = None) -> Arm:
    """
    Args:
        options: further ones of `load_engine`.
    """
    chosen = {"max_num_seqs": max_num_seqs, **(options or {})}
    return PipedArm(ENGINE, "benchmarks.engine_arm", model_path, json.dumps(chosen))


def transformers_arms(model_path: str) -> list[Arm]:
    module = "benchmarks.transformers_arm"
    return [
        PipedArm(TRANSFORMERS, module, model_path, "sequential"),
        PipedArm(BATCHED, module, model_path, "batched"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser("python -m benchmarks.engine", __doc__).parse_args(arguments)
    arms = [
        engine_arm(options.model_path, max(options.streams)),
        *transformers_arms(options.model_path),
    ]
    results = asyncio.run(run(arms, plan_of(options)))
    goals = list(goals_of(results))
    print_table(results)
    print_goals(goals)
    if options.record:
        name = Path(options.model_path).name
        write_record(options.record, name, results, goals, note=options.note)
    return 0 if all(goal.is_met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
