"""guidellm, unmodified, asks a real worker about synthetic pictures through OpenAI's API.

    python -m benchmarks.load_test --guidellm .venv-load/bin/guidellm [--record guidellm]

Nothing is downloaded: guidellm draws its pictures and words itself, and counts them with the
checkpoint's own tokenizer. `make load-test` installs guidellm into an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import busy_cpus
from benchmarks.report import write_figures
from benchmarks.worker import Worker
from models.command_line import HelpFormatter
from models.demo import DEMO_CHECKPOINT

SIDE = 336
"""Of the pictures, in pixels."""
PROMPT_TOKENS = 16
STARTING_S = 300
"""guidellm's own start and report, beyond the time of its questions."""
COLUMNS = (
    "requests",
    "failed",
    "requests/s",
    "tokens/s",
    "first token, ms",
    "p95",
    "per token, ms",
)


def command(guidellm: str, url: str, options: argparse.Namespace, report: Path) -> list[str]:
    streams = options.streams
    return [
        guidellm, "run", "--disable-progress",
        "--backend", f"kind=openai_http,target={url}",
        "--tokenizer", f"kind=huggingface_auto,model={options.model_path.resolve()}",
        "--data", f"kind=synthetic_image,width={SIDE},height={SIDE},format=png,content=noise,"
                  f"output_tokens={options.tokens}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS}",
        "--profile", f"kind=concurrent,streams={streams[0]}",
        "--override", "profile.streams", ",".join(map(str, streams)),
        "--constraint", f"kind=max_duration,seconds={options.seconds}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip


def figures_of(report: dict[str, Any]) -> dict[int, dict[str, float]]:
    """guidellm's own figures, by the number of streams."""
    found = {}
    for benchmark in report["benchmarks"]:
        metrics = benchmark["metrics"]
        totals = metrics["request_totals"]
        first_token = metrics["time_to_first_token_ms"]["successful"]
        values = (
            totals["successful"],
            totals["errored"],
            metrics["requests_per_second"]["successful"]["mean"],
            metrics["output_tokens_per_second"]["successful"]["mean"],
            first_token["median"],
            first_token["percentiles"]["p95"],
            metrics["inter_token_latency_ms"]["successful"]["median"],
        )
        streams = benchmark["config"]["strategy"]["streams"]
        found[streams] = dict(zip(COLUMNS, values, strict=True))
    return found


async def measure(options: argparse.Namespace) -> dict[int, dict[str, float]]:
    worker = Worker("launcher", str(options.model_path), max(options.streams))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        try:
            await worker.start()
            url = f"http://127.0.0.1:{worker.port}"
            await asyncio.to_thread(
                subprocess.run,
                command(options.guidellm, url, options, report),
                check=True,
                timeout=STARTING_S + options.seconds * len(options.streams),
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        finally:
            await worker.stop()
        return figures_of(json.loads(report.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_test", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--guidellm", default="guidellm", help="guidellm's command")
    parser.add_argument(
        "--model-path",
        type=Path,
        default=DEMO_CHECKPOINT,
        help="a checkpoint's folder; default: the demo's",
    )
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        default=[1, 4, 8],
        help="numbers of questions that are asked at a time",
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument(
        "--seconds", type=int, default=20, help="how long, for each number of streams"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    busy = busy_cpus()
    found = asyncio.run(measure(options))
    print("\n| streams | " + " | ".join(COLUMNS) + " |")
    print("|---:" * (len(COLUMNS) + 1) + "|")
    for streams, figures in found.items():
        shown = [f"{figures[name]:.1f}".removesuffix(".0") for name in COLUMNS]
        print(f"| {streams} | " + " | ".join(shown) + " |")
    if options.record:
        version = subprocess.run(
            [options.guidellm, "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
        write_figures(
            options.record, model=options.model_path.name, guidellm=version, picture=[SIDE, SIDE],
            prompt_tokens=PROMPT_TOKENS, tokens=options.tokens, seconds=options.seconds,
            busy_cpus_before=busy, streams=found,
        )  # fmt: skip
    failed = sum(figures["failed"] for figures in found.values())
    return 0 if not failed and all(figures["requests"] for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
