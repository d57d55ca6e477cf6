"""What a conversation's next turn costs: its first token, with the history known and unknown.

    python -m models.checkpoints synthesize --like vila1.5-3b --scale full \\
        --format llm-awq-v2 /tmp/VILA1.5-3b
    python -m benchmarks.prefix /tmp/VILA1.5-3b [--record NAME]

A question of 32 tokens after 16 to 4,096 tokens of history (fewer where the context ends before),
once with a history that the engine has never seen (cold) and once as the next turn of a
conversation that it has (warm). Beside it the time that reading the history's KV cache takes, one
pass over as many bytes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.goals import Goal
from benchmarks.machine import busy_cpus
from benchmarks.report import plot_lines, print_goals, write_figures
from models import SamplingParams
from models.command_line import HelpFormatter

if TYPE_CHECKING:
    from models import Engine

HISTORIES = (16, 64, 256, 1024, 4096)
QUESTION = 32
ROOM = 384
"""Tokens of a context that are left for a picture, the question and an answer."""
ANSWER = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True)
class Turn:
    """
    Attributes:
        history: its tokens, a picture's included.
        cold_s, warm_s: to the first token, median.
        cached: tokens that the warm turn found in the cache, at least.
        read_s: one pass over the history's KV cache.
    """

    history: int
    pictures: int
    cold_s: float
    warm_s: float
    cached: int
    read_s: float


class Words:
    """Texts of so many tokens that no two begin alike."""

    def __init__(self, encode: Callable[[str], Sequence[int]], seed: int) -> None:
        """
        Args:
            encode: the model's tokenizer's.
        """
        self._encode = encode
        self._random = random.Random(seed)
        self._bos = len(encode(""))

    def text(self, tokens: int) -> str:
        """Of `tokens` tokens; a few more where the tokenizer cuts no words finely enough."""
        words: list[str] = []
        while True:
            words += ["".join(self._random.choices("abcdefghij", k=4)) for _ in range(4)]
            if len(self._encode(" ".join(words))) - self._bos >= tokens:
                break
        while len(words) > 1 and self._length(words[:-1]) >= tokens:
            words.pop()
        return " ".join(words)

    def _length(self, words: Sequence[str]) -> int:
        return len(self._encode(" ".join(words))) - self._bos


def first_token(engine: Engine, prompt: str, pictures: Sequence[Image.Image]) -> tuple[float, int]:
    """(seconds to the first token, prompt tokens that were cached)."""
    asked = time.monotonic()
    (delta,) = engine.generate(prompt, pictures, ANSWER)
    return time.monotonic() - asked, delta.usage.cached_tokens


def measure(
    engine: Engine, history: int, pictured: bool, repeats: int, device: str = "cpu"
) -> Turn:
    """
    Args:
        device: where the engine's KV cache lies.
    """
    import torch

    from models.language.kv_cache import KVCacheShape

    words = Words(engine.encode, seed=history + pictured)
    size = KVCacheShape.of(engine.spec.language, engine.stats().block_size, torch.bfloat16)
    cold, warm, cached, length = [], [], [], 0
    for _ in range(repeats):
        pictures, head = [], ""
        if pictured:
            noise = torch.randint(0, 256, (336, 448, 3), dtype=torch.uint8)
            pictures, head = [Image.fromarray(noise.numpy())], "<image>\n"
        known = head + words.text(history)
        (delta,) = engine.generate(known, pictures, ANSWER)
        length = delta.usage.prompt_tokens
        seconds, hit = first_token(engine, f"{known} {words.text(QUESTION)}", pictures)
        warm.append(seconds)
        cached.append(hit)
        unknown = f"{head}{words.text(history)} {words.text(QUESTION)}"
        if pictured:
            pictures = [Image.fromarray(torch.randint_like(noise, 0, 256).numpy())]
        seconds, hit = first_token(engine, unknown, pictures)
        assert hit <= 1, "a history that nobody has sent was found in the cache"
        cold.append(seconds)
    kv_bytes = length * size.bytes_per_block // engine.stats().block_size
    return Turn(
        length, len(pictures), statistics.median(cold), statistics.median(warm), min(cached),
        _read_s(kv_bytes, device),
    )  # fmt: skip


def _read_s(num_bytes: int, device: str) -> float:
    import torch

    from benchmarks.stopwatch import Stopwatch

    memory = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return Stopwatch(torch.device(device)).best(memory.sum, repeats=5)


def goals_of(turns: Sequence[Turn]) -> list[Goal]:
    first, last = turns[0], turns[-1]
    growth = last.warm_s - first.warm_s
    kind = "picture and text" if last.pictures else "text"
    return [
        Goal(f"{kind}, warm / cold after {last.history} tokens", last.warm_s / last.cold_s, 0.15),
        Goal(
            f"{kind}, growth of the warm first token / one reading of its KV cache",
            growth / (last.read_s - first.read_s), 1.5,
        ),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of every length; times are medians over them"
    )
    parser.add_argument(
        "--record", metavar="NAME", help="write benchmarks/records/NAME.json and .png"
    )
    options = parser.parse_args(arguments)
    from models import load_engine

    busy = busy_cpus()
    results, goals = [], []
    with load_engine(options.folder, max_num_seqs=1) as engine:
        longest = engine.context_length - ROOM
        print("| history, tokens | pictures | cold, s | warm, s | warm / cold | read, s |")
        print("|---:|---:|---:|---:|---:|---:|")
        for pictured in (False, True):
            turns = []
            for history in sorted({min(history, longest) for history in HISTORIES}):
                turn = measure(engine, history, pictured, options.repeats)
                turns.append(turn)
                print(
                    f"| {turn.history} | {turn.pictures} | {turn.cold_s:.3f} | {turn.warm_s:.3f} | "
                    f"{turn.warm_s / turn.cold_s:.3f} | {turn.read_s:.4f} |",
                    flush=True,
                )
            results += turns
            goals += goals_of(turns)
        backend = engine.description()["backend"]
    print_goals(goals)
    if options.record:
        write_figures(
            options.record, model=options.folder.name, backend=backend, busy_cpus_before=busy,
            turns=[asdict(turn) for turn in results], goals=[goal.as_json() for goal in goals],
        )  # fmt: skip
        plot_lines(
            options.record, "tokens of history", "first token, s",
            {
                f"{way}, {'picture and text' if pictures else 'text'}": [
                    (turn.history, seconds)
                    for turn in results
                    if turn.pictures == pictures
                    for seconds in [turn.cold_s if way == "cold" else turn.warm_s]
                ]
                for way in ("cold", "warm")
                for pictures in (0, 1)
            },
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
