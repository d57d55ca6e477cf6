"""What arriving prompts cost the streams that run: 4 prompts of 2,000 tokens beside 4 streams.

    python -m benchmarks.chunked_prefill FOLDER [--budgets 32 64 128 256 512] [--record NAME]

For every `max_num_batched_tokens`: the streams' time per token with and without the prompts, and
how fast the prompts are computed. A smaller budget spares the streams and slows the prompts down;
where the line lies is the processor's doing, so the table is there to choose from.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.goals import Goal
from benchmarks.machine import busy_cpus
from benchmarks.prefix import Words
from benchmarks.report import print_goals, write_figures
from models import SamplingParams
from models.command_line import HelpFormatter

if TYPE_CHECKING:
    from models import Engine

STREAMS, ARRIVING, PROMPT = 4, 4, 2000
QUIET_TOKENS = 32
LIMIT = 1.5
ANSWER = SamplingParams(temperature=0, max_new_tokens=100_000, ignore_eos=True)
FIRST = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True)
class Figures:
    """
    Attributes:
        quiet_s, busy_s: a running stream's time per token, mean, before the prompts came and while
            they were computed.
        longest_s: between two tokens of a stream meanwhile.
        prompt_tokens_per_s: of the arriving prompts together.
    """

    budget: int
    quiet_s: float
    busy_s: float
    longest_s: float
    prompt_tokens_per_s: float

    @property
    def ratio(self) -> float:
        return self.busy_s / self.quiet_s


async def measure(engine: Engine, budget: int, prompt_tokens: int) -> Figures:
    words = Words(engine, seed=budget)
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]

    async def stream(times: list[float]) -> None:
        async for delta in engine.stream(words.text(16), (), ANSWER):
            times += [time.monotonic()] * len(delta.token_ids)

    async def arrive(prompt: str) -> int:
        return [d.usage.prompt_tokens async for d in engine.stream(prompt, (), FIRST)][-1]

    prompts = [words.text(prompt_tokens) for _ in range(ARRIVING)]
    running = [asyncio.create_task(stream(times)) for times in arrivals]
    while min(map(len, arrivals)) < QUIET_TOKENS + 1:
        await asyncio.sleep(0.01)
    asked = time.monotonic()
    tokens = sum(await asyncio.gather(*map(arrive, prompts)))
    answered = time.monotonic()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    quiet = [_gaps([t for t in times if t <= asked]) for times in arrivals]
    busy = [
        # From the last token before the prompts came to the first one after they were computed.
        _gaps([max(t for t in times if t <= asked), *(t for t in times if asked < t <= answered)])
        for times in arrivals
    ]
    return Figures(
        budget,
        statistics.mean(gap for gaps in quiet for gap in gaps[-QUIET_TOKENS:]),
        statistics.mean(gap for gaps in busy for gap in gaps),
        max(gap for gaps in busy for gap in gaps),
        tokens / (answered - asked),
    )


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunked_prefill",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512],
        help="values of max_num_batched_tokens, in tokens",
    )  # fmt: skip
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of each prompt")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    from models import load_engine

    busy = busy_cpus()
    results = []
    print(
        "| tokens in a step | per token, ms | beside prompts, ms | ratio | longest, ms | ", end=""
    )
    print("| prompts, tokens/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for budget in options.budgets:
        with load_engine(
            options.folder, max_model_len=options.prompt + 1024, max_num_seqs=STREAMS + ARRIVING,
            max_num_batched_tokens=budget,
        ) as engine:  # fmt: skip
            figures = asyncio.run(measure(engine, budget, options.prompt))
        results.append(figures)
        print(
            f"| {budget} | {figures.quiet_s * 1000:.1f} | {figures.busy_s * 1000:.1f} | "
            f"{figures.ratio:.2f} | {figures.longest_s * 1000:.0f} | "
            f"{figures.prompt_tokens_per_s:.0f} |",
            flush=True,
        )
    best = min(results, key=lambda figures: figures.ratio)
    goal = Goal(
        f"{best.budget} tokens in a step, time per token beside prompts / without",
        best.ratio,
        LIMIT,
    )
    print_goals([goal])
    if options.record:
        write_figures(
            options.record, model=options.folder.name, busy_cpus_before=busy,
            streams=STREAMS, arriving=ARRIVING, prompt=options.prompt,
            results=[{**asdict(figures), "ratio": figures.ratio} for figures in results],
            goals=[goal.as_json()],
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
