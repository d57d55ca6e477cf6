"""What it costs to answer in a form that is given (structured output).

    python -m benchmarks.structured [--streams 8] [--record structured]

The engine alone, in this process, answers the same questions with and without a guide, in turns,
each answer of so many tokens; the ratio is the median of those within a repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.report import write_figures
from models import Guide, SamplingParams
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT

if TYPE_CHECKING:
    from models import Engine

GOAL = 0.9
"""Of the tokens per second without a guide."""
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer"},
    },
    "required": ["name", "colour", "count"],
    "additionalProperties": False,
}
# None of them can end before the answers' length is reached.
GUIDES = {
    "free": None,
    "json_schema": Guide("json_schema", json.dumps({
        "type": "array", "items": ITEM, "minItems": 10_000,
    })),
    "regex": Guide("regex", "([a-z]+ [0-9]+, )+[A-Z]{2000}"),
}  # fmt: skip


async def tokens_per_second(
    engine: Engine, guide: Guide | None, streams: int, num_tokens: int
) -> float:
    params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True, guide=guide)

    async def answer(number: int) -> int:
        prompt = f"USER: {number}: what is there to see? ASSISTANT:"
        return sum([len(d.token_ids) async for d in engine.stream(prompt, params=params)])

    started = time.perf_counter()
    counts = await asyncio.gather(*map(answer, range(streams)))
    return sum(counts) / (time.perf_counter() - started)


async def measure(
    engine: Engine, streams: int, num_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Tokens per second by guide, one figure for each repeat; each begins with another one."""
    found: dict[str, list[float]] = {name: [] for name in GUIDES}
    for guide in GUIDES.values():  # compiles it, once
        await tokens_per_second(engine, guide, streams, num_tokens)
    names = list(GUIDES)
    for repeat in tqdm(range(repeats), unit="repeat"):
        at = repeat % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(await tokens_per_second(engine, GUIDES[name], streams, num_tokens))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--model-path",
        type=Path,
        default=DEMO_CHECKPOINT,
        help="a checkpoint's folder; default: the demo's",
    )
    parser.add_argument("--streams", type=int, default=8, help="questions that are asked at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every answer")
    parser.add_argument(
        "--repeats", type=int, default=9, help="rounds of everything; ratios are medians over them"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    from models import load_engine

    with load_engine(options.model_path, max_num_seqs=options.streams) as engine:
        found = asyncio.run(measure(engine, options.streams, options.tokens, options.repeats))
    ratios = {
        name: median(a / b for a, b in zip(speeds, found["free"], strict=True))
        for name, speeds in found.items()
    }
    print("| answers | tokens/s | of free ones |")
    print("|---|---:|---:|")
    for name, speeds in found.items():
        print(f"| {name} | {median(speeds):.0f} | {ratios[name]:.1%} |")
    if options.record:
        write_figures(
            options.record, model=options.model_path.name, streams=options.streams,
            tokens=options.tokens, tokens_per_s=found, ratios=ratios,
        )  # fmt: skip
    return 0 if min(ratios.values()) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
