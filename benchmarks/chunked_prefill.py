"""What arriving prompts cost the streams that run: 4 prompts of 2,000 tokens beside 4 streams.

    python -m benchmarks.chunked_prefill [FOLDER] [--slowdowns 0.2 0.45 none] [--record NAME]

For every `max_prefill_slowdown`, and without one for every `max_num_batched_tokens`: the streams'
time per token with and without the prompts, and how fast the prompts are computed. What spares the
streams slows the prompts down. All take turns, and figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.goals import Goal
from benchmarks.machine import busy_cpus
from benchmarks.prefix import Words
from benchmarks.report import print_goals, write_figures
from models import SamplingParams
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT
from models.engine.options import EngineOptions

if TYPE_CHECKING:
    from models import Engine

STREAMS, ARRIVING, PROMPT = 4, 4, 2000
QUIET_TOKENS = 32
CONTEXT, WHOLE_STEP = 1024, 512
LIMIT = 1.5
DEFAULT = EngineOptions.max_prefill_slowdown
ANSWER = SamplingParams(temperature=0, max_new_tokens=100_000, ignore_eos=True)
FIRST = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


class Limits(NamedTuple):
    """The engine's options of these names."""

    max_prefill_slowdown: float | None
    max_num_batched_tokens: int

    def __str__(self) -> str:
        if self.max_prefill_slowdown is None:
            return f"no limit, {self.max_num_batched_tokens} tokens in a step"
        return f"slowdown {self.max_prefill_slowdown}"


@dataclass(frozen=True)
class Figures:
    """
    Attributes:
        quiet_s, busy_s: a running stream's time per token, mean, without the prompts and while
            they were computed. Without them is before they came and after they were computed, in
            equal parts, since each token takes longer than the one before it: it attends to more.
        longest_s: between two tokens of a stream meanwhile.
        first_token_s: of the arriving prompts, mean.
        prompt_tokens_per_s: of the arriving prompts together.
    """

    quiet_s: float
    busy_s: float
    longest_s: float
    first_token_s: float
    prompt_tokens_per_s: float

    @property
    def ratio(self) -> float:
        return self.busy_s / self.quiet_s


async def measure(engine: Engine, seed: int, prompt_tokens: int) -> Figures:
    words = Words(engine.encode, seed)
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]

    async def stream(times: list[float]) -> None:
        async for delta in engine.stream(words.text(16), (), ANSWER):
            times += [time.monotonic()] * len(delta.token_ids)

    async def arrive(prompt: str) -> tuple[int, float]:
        (delta,) = [delta async for delta in engine.stream(prompt, (), FIRST)]
        return delta.usage.prompt_tokens, time.monotonic() - asked

    prompts = [words.text(prompt_tokens) for _ in range(ARRIVING)]
    running = [asyncio.create_task(stream(times)) for times in arrivals]

    async def wait_for_tokens() -> None:
        enough = [len(times) + QUIET_TOKENS + 1 for times in arrivals]
        while any(len(times) < n for times, n in zip(arrivals, enough, strict=True)):
            await asyncio.sleep(0.01)

    await wait_for_tokens()
    asked = time.monotonic()
    firsts = await asyncio.gather(*map(arrive, prompts))
    answered = time.monotonic()
    await wait_for_tokens()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    before = [_gaps([t for t in times if t <= asked])[-QUIET_TOKENS:] for times in arrivals]
    after = [_gaps([t for t in times if t > answered])[:QUIET_TOKENS] for times in arrivals]
    busy = [
        # From the last token before the prompts came to the first one after they were computed.
        _gaps([max(t for t in times if t <= asked), *(t for t in times if asked < t <= answered)])
        for times in arrivals
    ]
    return Figures(
        statistics.mean(
            statistics.mean(g for gaps in part for g in gaps) for part in (before, after)
        ),
        statistics.mean(gap for gaps in busy for gap in gaps),
        max(gap for gaps in busy for gap in gaps),
        statistics.mean(seconds for _, seconds in firsts),
        sum(tokens for tokens, _ in firsts) / (answered - asked),
    )


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def median(figures: Sequence[Figures]) -> Figures:
    return Figures(*(
        statistics.median(getattr(figure, field.name) for figure in figures)
        for field in fields(Figures)
    ))  # fmt: skip


def _share(text: str) -> float | None:
    return None if text == "none" else float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunked_prefill",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEMO_CHECKPOINT,
        help="a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--slowdowns", type=_share, nargs="*", default=[0.2, DEFAULT],
        help="values of max_prefill_slowdown, shares",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=int, nargs="*", default=[64, 512],
        help="values of max_num_batched_tokens without such a limit, tokens",
    )  # fmt: skip
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=3, help="of every arm, in turns")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    from models import load_engine

    busy = busy_cpus()
    arms = [Limits(share, WHOLE_STEP) for share in options.slowdowns]
    arms += [Limits(None, budget) for budget in options.budgets]
    results: dict[Limits, list[Figures]] = {limits: [] for limits in arms}
    for repeat in range(options.repeats):
        at = repeat % len(arms)
        for limits in arms[at:] + arms[:at]:
            with load_engine(
                options.folder, max_model_len=options.prompt + CONTEXT,
                max_num_seqs=STREAMS + ARRIVING, **limits._asdict(),
            ) as engine:  # fmt: skip
                results[limits].append(asyncio.run(measure(engine, repeat, options.prompt)))
    print("| prompts in a step | per token, ms | beside prompts, ms | ratio | longest, ms ", end="")
    print("| prompts: first token, s | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for limits, every in results.items():
        figures = median(every)
        print(
            f"| {limits} | {figures.quiet_s * 1000:.1f} | {figures.busy_s * 1000:.1f} | "
            f"{_ratio(every):.2f} | {figures.longest_s * 1000:.0f} | {figures.first_token_s:.1f} | "
            f"{figures.prompt_tokens_per_s:.0f} |"
        )
    goals = [
        Goal(f"{limits}: time per token beside prompts / without", _ratio(every), LIMIT)
        for limits, every in results.items()
        if limits.max_prefill_slowdown == DEFAULT
    ]
    print_goals(goals)
    if options.record:
        write_figures(
            options.record, model=options.folder.name, busy_cpus_before=busy,
            streams=STREAMS, arriving=ARRIVING, prompt=options.prompt,
            results=[
                {
                    **limits._asdict(), "ratio": _ratio(every),
                    "repeats": [asdict(figures) for figures in every],
                }
                for limits, every in results.items()
            ],
            goals=[goal.as_json() for goal in goals],
        )  # fmt: skip
    return 0 if all(goal.is_met for goal in goals) else 1


def _ratio(figures: Sequence[Figures]) -> float:
    """The median of those within a repeat: what slows the machine slows both."""
    return statistics.median(figure.ratio for figure in figures)


if __name__ == "__main__":
    sys.exit(main())
