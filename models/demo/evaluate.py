"""Asks the demo model held-out questions, in 16 bits and in 4, and says how often it is right.

    python -m models.demo.evaluate [--model FOLDER] [--output RECORD.json] [--questions N]

The status is 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from models import SamplingParams, load_engine
from models.checkpoints.spec import Precision
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT
from models.demo.held_out import HeldOut, held_out
from models.demo.teacher import answer_losses, load_network

PRECISIONS: tuple[Precision, ...] = ("W16A16", "W4A16")
QUESTIONS = 3000
CHUNK = 240
"""Questions in the engine at a time."""
MAX_NEW_TOKENS = 40
LEAST_FOR_ANSWER = 30
"""An answer that occurs less often is reported with its kind only."""
SHOWN_MISSES = 60

OVERALL, BY_KIND, BY_ANSWER, LOST_IN_4_BITS = 0.95, 0.90, 0.80, 0.015
"""The gates."""


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        given: the model's answer.
        loss, tokens: of the true answer: the sum over its tokens, and their number.
    """

    item: HeldOut
    given: str
    loss: float
    tokens: int

    @property
    def right(self) -> bool:
        return self.given == self.item.question.answer


def ask(model: Path, precision: Precision, items: Sequence[HeldOut]) -> list[Outcome]:
    """Greedy answers through the engine, and the true answers' losses."""
    given: list[str] = []
    params = SamplingParams(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    with load_engine(model, precision=precision, max_num_seqs=32) as engine:
        for start in tqdm(range(0, len(items), CHUNK), precision, unit="chunk"):
            prompts = [
                (item.prompt, [] if item.image is None else [item.image])
                for item in items[start : start + CHUNK]
            ]
            given += [text.strip() for text in engine.generate_batch(prompts, params)]
    network = load_network(model, precision)
    losses = answer_losses(network, Tokenizer.from_file(str(model / "tokenizer.json")), items)
    return [
        Outcome(item, text, loss, tokens)
        for item, text, (loss, tokens) in zip(items, given, losses, strict=True)
    ]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Exact match and loss: of all, by kind, and by answer."""
    by_answer = _grouped(outcomes, lambda one: one.item.question.answer)
    return {
        **_summary(outcomes),
        "by_kind": _summaries(_grouped(outcomes, lambda one: one.item.question.kind)),
        "by_answer": _summaries({
            answer: group for answer, group in by_answer.items()
            if len(group) >= LEAST_FOR_ANSWER
        }),
        "by_way": _summaries(_grouped(outcomes, _way)),
        "misses": [
            {"prompt": one.item.prompt, "true": one.item.question.answer, "given": one.given}
            for one in outcomes if not one.right
        ][:SHOWN_MISSES],
    }  # fmt: skip


def missed_gates(record: Mapping[str, Any]) -> list[str]:
    """
    Args:
        record: `summarise`'s results by precision.
    """
    missed = []
    for precision, summary in record.items():
        if summary["exact_match"] < OVERALL:
            missed.append(f"{precision}: {summary['exact_match']:.1%} overall, not {OVERALL:.0%}")
        for part, least in (("by_kind", BY_KIND), ("by_answer", BY_ANSWER)):
            missed += [
                f"{precision}: {one['exact_match']:.1%} on {name!r}, not {least:.0%}"
                for name, one in summary[part].items()
                if one["exact_match"] < least
            ]
    lost = record["W16A16"]["exact_match"] - record["W4A16"]["exact_match"]
    if lost > LOST_IN_4_BITS:
        missed.append(f"4 bits lose {lost:.1%}, more than {LOST_IN_4_BITS:.1%}")
    return missed


def print_tables(record: Mapping[str, Any]) -> None:
    for part in ("by_kind", "by_way", "by_answer"):
        print(f"\n{part.replace('_', ' '):<76} {'n':>5}  16 bits  4 bits   loss 16  loss 4")
        names = record["W16A16"][part]
        for name in sorted(names, key=lambda name: names[name]["exact_match"]):
            _print_row(name, *(record[precision][part][name] for precision in PRECISIONS))
    print()
    _print_row("all", *(record[precision] for precision in PRECISIONS))


def _print_row(name: str, sixteen: Mapping[str, Any], four: Mapping[str, Any]) -> None:
    print(
        f"{name:<76} {sixteen['count']:>5}  {sixteen['exact_match']:>7.1%} "
        f"{four['exact_match']:>7.1%}   {sixteen['loss']:>7.4f} {four['loss']:>7.4f}"
    )


def _way(one: Outcome) -> str:
    """How it was asked."""
    if one.item.image is None:
        return "no picture"
    place = "picture after" if one.item.dialogue.prompt.endswith(
        ("<image> ASSISTANT:", "<image>\n ASSISTANT:")
    ) else "picture before"  # fmt: skip
    width, height = one.item.image.size
    outline = "square" if width == height else "wide" if width > height else "tall"
    turn = "later turn" if one.item.dialogue.later else "first turn"
    return f"{place}, {outline}, {turn}"


def _grouped(
    outcomes: Sequence[Outcome], key: Callable[[Outcome], str]
) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        groups[key(one)].append(one)
    return dict(sorted(groups.items()))


def _summaries(groups: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, float]]:
    return {name: _summary(group) for name, group in groups.items()}


def _summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The loss is per token of the answers."""
    return {
        "count": len(outcomes),
        "exact_match": round(sum(one.right for one in outcomes) / len(outcomes), 4),
        "loss": round(sum(one.loss for one in outcomes) / sum(one.tokens for one in outcomes), 5),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.evaluate", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEMO_CHECKPOINT,
        metavar="FOLDER",
        help="a demo checkpoint; default: the one that ships",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the figures, a JSON file, there"
    )
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many are asked")
    options = parser.parse_args(arguments)
    items = held_out(options.questions)
    record: dict[str, Any] = {
        precision: summarise(ask(options.model, precision, items)) for precision in PRECISIONS
    }
    missed = missed_gates(record)
    print_tables(record)
    print("\n".join(["", *missed]) if missed else "\nevery gate is passed")
    if options.output is not None:
        whole = {"questions": len(items), "missed_gates": missed, **record}
        text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        options.output.write_text(text, encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
