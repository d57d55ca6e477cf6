"""How often an answer in bf16 differs in company from the same answer alone.

    python -m benchmarks.bf16_divergence [--questions 64] [--record bf16_divergence]

In fp32, on the reference backend, an answer is the same in any company, and the tests hold it to
that; that row is printed here as a control. In bf16 a product of several rows is rounded otherwise
than a product of one, so that two tokens which are nearly equally likely can change places; what
follows such a token is another answer. That is reported here, not forbidden.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image

from benchmarks.report import write_figures
from models import SamplingParams
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT
from models.demo.held_out import held_out

if TYPE_CHECKING:
    from models import Engine

Precision = Literal["W4A16", "W16A16"]
Question = tuple[str, Sequence[Image]]
Answer = list[int]
SETTINGS: tuple[tuple[Precision, str], ...] = (
    ("W4A16", "bfloat16"), ("W16A16", "bfloat16"), ("W4A16", "float32"),
)  # fmt: skip
LENGTHS = {
    "to its end": SamplingParams(temperature=0, max_new_tokens=64),
    "of 64 tokens": SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True),
}
"""Answers as users see them; and longer ones, in which a difference has more occasions."""


@dataclass(frozen=True)
class Divergence:
    """Of the answers of one setting, at one number of requests at a time."""

    precision: str
    dtype: str
    length: str
    at_a_time: int
    answers: int
    tokens: int
    first_differences: list[int]
    """Of each answer that differs, how many tokens were the same."""

    @classmethod
    def between(
        cls, setting: tuple[str, str], length: str, at_a_time: int,
        alone: Sequence[Answer], together: Sequence[Answer],
    ) -> Divergence:  # fmt: skip
        differing = [_same(a, b) for a, b in zip(alone, together, strict=True) if a != b]
        return cls(*setting, length, at_a_time, len(alone), sum(map(len, alone)), differing)

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "share": len(self.first_differences) / self.answers}

    def __str__(self) -> str:
        differ = self.first_differences
        where = f"{median(differ):.0f}" if differ else "-"
        return (
            f"| {self.precision} | {self.dtype} | {self.length} | {self.at_a_time} | "
            f"{len(differ)} of {self.answers} | {len(differ) / self.answers:.1%} | {where} |"
        )


def _same(one: Answer, other: Answer) -> int:
    """How many tokens they begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def measure(
    model: Path, questions: Sequence[Question], at_a_time: Sequence[int]
) -> Iterator[Divergence]:
    for precision, dtype in SETTINGS:
        alone = ask(model, precision, dtype, questions, 1)
        for seqs in at_a_time:
            together = ask(model, precision, dtype, questions, seqs)
            for name in LENGTHS:
                yield Divergence.between(
                    (precision, dtype), name, seqs, alone[name], together[name]
                )


def ask(
    model: Path, precision: Precision, dtype: str, questions: Sequence[Question], seqs: int
) -> dict[str, list[Answer]]:
    """All answers, by their length, of an engine that runs `seqs` requests at a time."""
    from models import load_engine

    # Without the prefix cache, so that every answer is computed in full.
    with load_engine(
        model, precision=precision, device="cpu", dtype=dtype, max_num_seqs=seqs,
        enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        return {
            name: asyncio.run(_ask(engine, questions, params)) for name, params in LENGTHS.items()
        }


async def _ask(
    engine: Engine, questions: Sequence[Question], params: SamplingParams
) -> list[Answer]:
    async def one(question: Question) -> Answer:
        return [
            token async for delta in engine.stream(*question, params) for token in delta.token_ids
        ]

    return await asyncio.gather(*map(one, questions))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bf16_divergence",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model-path",
        type=Path,
        default=DEMO_CHECKPOINT,
        help="a checkpoint's folder; default: the demo's",
    )
    parser.add_argument("--questions", type=int, default=128, help="how many are asked")
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        default=[4, 16],
        help="numbers of questions that are asked at a time",
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    questions: list[Question] = [
        (item.prompt, [] if item.image is None else [item.image])
        for item in held_out(options.questions)[: options.questions]
    ]
    print("| precision | dtype | answers | at a time | differ | share | same tokens before |")
    print("|---|---|---|---:|---:|---:|---:|")
    found = []
    for divergence in measure(options.model_path, questions, options.streams):
        found.append(divergence)
        print(divergence, flush=True)
    if options.record:
        write_figures(
            options.record, model=options.model_path.name,
            results=[divergence.as_json() for divergence in found],
        )  # fmt: skip
    control = [d for d in found if d.dtype == "float32"]
    return 1 if any(d.first_differences for d in control) else 0


if __name__ == "__main__":
    sys.exit(main())
