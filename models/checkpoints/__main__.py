"""`python -m models.checkpoints synthesize | inspect`: see `--help` of each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from models.command_line import HelpFormatter
from models.errors import CheckpointError, ConfigurationError

PROGRAM = "python -m models.checkpoints"
CANNOT_BE_SERVED, BAD_ARGUMENTS = 1, 2
EXAMPLES = """\
examples:
  python -m models.checkpoints inspect /data/VILA1.5-3b-AWQ
  python -m models.checkpoints synthesize --like vila1.5-3b /tmp/vila1.5-tiny
"""
SYNTHESIZE = """\
Write a checkpoint of random weights in the exact layout, tensor names, dtypes and files of a
released family, its tokenizer included. It is served like any other; its answers mean nothing.

examples:
  # 3 MB, 16-bit and llm-awq weights in one folder
  python -m models.checkpoints synthesize --like vila1.5-3b /tmp/vila1.5-tiny
  # 2.5 GB in the real sizes, to see how it loads
  python -m models.checkpoints synthesize --like vila1.5-3b --scale full \\
      --format llm-awq-v2 /tmp/vila1.5-3b"""
INSPECT = """\
Say what a checkpoint holds, what memory it needs, and whether it can be served. Reads headers, no
weights, and downloads nothing. Ends with status 1 and the reason if it cannot be served.

examples:
  python -m models.checkpoints inspect /data/VILA1.5-3b-AWQ
  python -m models.checkpoints inspect /data/VILA1.5-3b-AWQ --context 2048 --concurrency 4"""


class Parser(argparse.ArgumentParser):
    """Answers bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENTS, f"{self.prog}: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    from models.checkpoints.synthesis import (
        DEFAULT_FORMATS,
        FAMILIES,
        GROUP_SIZES,
        HF_NAMES,
        OUTPUT_FORMATS,
    )

    parser = Parser(
        prog=PROGRAM,
        description="Look at checkpoints, or make some to test with.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    synthesize = commands.add_parser(
        "synthesize",
        help="write a checkpoint of random weights",
        description=SYNTHESIZE,
        formatter_class=HelpFormatter,
    )
    synthesize.add_argument("out", metavar="OUT", type=Path, help="its folder: new, or empty")
    synthesize.add_argument(
        "--like", required=True, metavar="FAMILY", help=f"one of: {', '.join(FAMILIES)}"
    )
    synthesize.add_argument(
        "--scale",
        choices=("tiny", "full"),
        default="tiny",
        help="tiny (default): two layers, about 3 MB; full: the real sizes",
    )
    synthesize.add_argument(
        "--format",
        action="append",
        metavar="FORMAT",
        help=f"one of: {', '.join(OUTPUT_FORMATS)}; or all. May be given several times; default: "
        f"{' and '.join(DEFAULT_FORMATS)}. 16bit and llm-awq's lie together in OUT; each of the "
        "others is a checkpoint of its own, in OUT-FORMAT if there are several",
    )
    synthesize.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=128,
        help="inputs that share a scale and a zero point in 4-bit formats",
    )
    synthesize.add_argument("--seed", type=int, default=0, help="of the random weights")
    synthesize.add_argument(
        "--naming",
        choices=[*HF_NAMES],
        default="released",
        help="of tensors in transformers' layout: as llava-hf released them (default), as "
        "transformers 5 saves them, or by its own modules",
    )
    synthesize.set_defaults(run=_synthesize)

    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds and needs",
        description=INSPECT,
        formatter_class=HelpFormatter,
    )
    inspect.add_argument("path", metavar="PATH", help="its folder, or the Hub id of a cached one")
    inspect.add_argument(
        "--quant-path", help="AWQ weights, a file or a folder, where they are not inside PATH"
    )
    inspect.add_argument(
        "--precision",
        choices=("W4A16", "W16A16"),
        help="4-bit or 16-bit weights; default: W4A16 where there are 4-bit weights",
    )
    inspect.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        help="longest prompt and answer together, in tokens; default: the model's",
    )
    inspect.add_argument(
        "--concurrency",
        type=_positive,
        metavar="N",
        help="requests at a time; default: 8 on a CPU, 64 on a GPU",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON, for programs")
    inspect.set_defaults(run=_inspect)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ConfigurationError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except CheckpointError as error:
        if getattr(options, "json", False):
            answer = {"name": options.path, "servable": False, "reason": str(error)}
            print(json.dumps(answer, indent=2))
        print(f"{options.path} cannot be served: {error}", file=sys.stderr)
        return CANNOT_BE_SERVED
    return 0


def _synthesize(options: argparse.Namespace) -> None:
    from models.checkpoints.synthesis import DEFAULT_FORMATS, OUTPUT_FORMATS, synthesize

    formats = options.format or DEFAULT_FORMATS
    for folder in synthesize(
        options.like,
        options.out,
        scale=options.scale,
        formats=[*OUTPUT_FORMATS] if "all" in formats else formats,
        group_size=options.group_size,
        seed=options.seed,
        naming=options.naming,
        progress=True,
    ):
        print(folder)


def _inspect(options: argparse.Namespace) -> None:
    from models.checkpoints.inspection import inspect_checkpoint, render

    inspection = inspect_checkpoint(
        options.path,
        options.quant_path,
        options.precision,
        context=options.context,
        concurrency=options.concurrency,
    )
    if options.json:
        print(
            json.dumps({"name": inspection.name, "servable": True, **inspection.sections}, indent=2)
        )
    else:
        print(render(inspection))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
