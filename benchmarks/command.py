"""The options that both commands have."""

from __future__ import annotations

import argparse

from benchmarks.comparison import Plan
from models.demo import DEMO_CHECKPOINT


def build_parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument(
        "--model-path", default=str(DEMO_CHECKPOINT), help="default: the demo checkpoint"
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 4, 8, 16, 32],
        help="questions that are asked at a time; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=128, help="of every answer; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--same-picture", action="store_true", help="ask about one picture again and again"
    )
    parser.add_argument("--record", default=None, help="its name in benchmarks/records/")
    parser.add_argument("--note", default="", help="what should be known about this run")
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(options.streams, options.tokens, options.repeats, options.same_picture)
