"""The options that `benchmarks.engine` and `benchmarks.serving` have in common."""

from __future__ import annotations

import argparse

from benchmarks.comparison import Plan
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT


def build_parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--model-path",
        default=str(DEMO_CHECKPOINT),
        help="a checkpoint's folder; default: the demo's",
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 4, 8, 16, 32],
        help="numbers of questions that are asked at a time, each measured in turn",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every answer")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds of everything; figures are medians over them"
    )
    parser.add_argument(
        "--same-picture", action="store_true", help="ask about one picture again and again"
    )
    parser.add_argument(
        "--record", metavar="NAME", help="write benchmarks/records/NAME.json and its plot, NAME.png"
    )
    parser.add_argument(
        "--note", default="", help="what should be known about this run; goes into the record"
    )
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(options.streams, options.tokens, options.repeats, options.same_picture)
