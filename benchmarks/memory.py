"""Whether memory stays flat: thousands of questions, each about a new picture.

    python -m benchmarks.memory [FOLDER] [--requests 2000] [--record NAME]

The resident memory of the engine's process, after every hundredth request. The first half fills
the caches (KV blocks, picture embeddings), which are bounded; over the second half it may not grow
by more than a hundredth of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from PIL import Image

from benchmarks.goals import Goal
from benchmarks.load import Question, make_questions
from benchmarks.machine import busy_cpus
from benchmarks.report import plot_lines, print_goals, write_figures
from models import SamplingParams
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT

if TYPE_CHECKING:
    from models import Engine

EVERY = 100
STREAMS = 8
ANSWER = SamplingParams(temperature=0, max_new_tokens=8)
IMAGE_CACHE_BYTES = 4 << 20
KV_CACHE_BYTES = 8 << 20
"""Small, so that they are full long before half of the requests: memory of a large KV cache counts
only once its blocks have been written to."""


async def measure(engine: Engine, requests: int) -> list[int]:
    """Bytes of resident memory, after every EVERY requests."""
    process = psutil.Process()
    samples: list[int] = []
    for first in range(0, requests, EVERY):
        questions = iter(make_questions(first, EVERY))  # the streams share it
        await asyncio.gather(*(_ask(engine, questions) for _ in range(STREAMS)))
        samples.append(process.memory_info().rss)
        print(f"{first + EVERY}: {samples[-1] / 1e6:.1f} MB", flush=True)
    return samples


async def _ask(engine: Engine, questions: Iterator[Question]) -> None:
    for question in questions:
        picture = Image.open(io.BytesIO(question.picture))
        async for _ in engine.stream(question.prompt, [picture], ANSWER):
            pass


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=DEMO_CHECKPOINT,
        help="a checkpoint; default: the demo's",
    )
    parser.add_argument("--requests", type=int, default=2000, help="questions in all")
    parser.add_argument(
        "--record", metavar="NAME", help="write benchmarks/records/NAME.json and .png"
    )
    options = parser.parse_args(arguments)
    from models import load_engine

    busy = busy_cpus()
    with load_engine(
        options.folder,
        max_num_seqs=STREAMS,
        image_cache_bytes=IMAGE_CACHE_BYTES,
        kv_cache_bytes=KV_CACHE_BYTES,
    ) as engine:
        samples = asyncio.run(measure(engine, options.requests))
        stats = engine.stats()
    half = samples[len(samples) // 2 :]
    goals = [
        Goal("memory, end / half way", half[-1] / half[0], 1.01),
        Goal("picture cache, bytes", stats.image_cache_bytes, IMAGE_CACHE_BYTES),
        Goal("KV blocks in use at the end", stats.blocks_used, 0),
    ]
    print_goals(goals)
    if options.record:
        write_figures(
            options.record, model=options.folder.name, requests=options.requests, every=EVERY,
            busy_cpus_before=busy, rss_bytes=samples, goals=[goal.as_json() for goal in goals],
        )  # fmt: skip
        points = [(EVERY * (i + 1), rss / 1e6) for i, rss in enumerate(samples)]
        plot_lines(options.record, "requests", "resident memory, MB", {"engine": points}, log=False)
    return 0 if all(goal.is_met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
