"""A language model on a CPU, whole: our engine, transformers and llama.cpp, in turns.

    python -m benchmarks.cpu_end_to_end FOLDER [--size 1b|3b] [--llama FOLDER] [--record NAME]

Random weights in the shapes of Sheared LLaMA 1.3B or 2.7B are written into FOLDER where it has
none yet. `engine` is our engine with 4-bit weights, `engine, torch's kernels` the same without
kernels of our own, `transformers` its model in bfloat16. --llama names a folder of llama.cpp's
`llama-bench` and `llama-batched-bench`: then the shapes are also written as a GGUF file in Q4_0
(with the package gguf), which those run. Each arm is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gguf_model import write_q4_0
from benchmarks.machine import busy_cpus
from benchmarks.report import write_figures
from models import Engine, SamplingParams, load_engine
from models.checkpoints.synthesis.families import FAMILIES
from models.checkpoints.synthesis.family import Family, LanguageModel, Tower
from models.checkpoints.synthesis.synthesize import synthesize
from models.command_line import HelpFormatter
from models.native.library import SWITCH
from models.prompts import load_tokenizer

LANGUAGE = {
    "1b": LanguageModel("llama", 2048, 5504, 24, 16, 16),
    "3b": LanguageModel("llama", 2560, 6912, 32, 20, 20),
}
TOWER = Tower("siglip", "google/siglip-so400m-patch14-384", 64, 128, 2, 2, 384, 14)
"""Never run here: as small as its kind allows."""
PROMPT_TOKENS = 640
DECODE_TOKENS = 32
STREAMS = (1, 4)
SHORT_PROMPT = 16
TURNS = 5


@dataclass(frozen=True)
class Figures:
    """Of one turn: seconds of the prompt, tokens per second by the number of streams."""

    prefill_s: float
    decode_per_s: dict[int, float]


class Arm(ABC):
    name: str

    @abstractmethod
    def turn(self) -> Figures: ...

    @abstractmethod
    def close(self) -> None:
        """Ends what it started."""


class ProcessArm(Arm):
    """Runs `serve(connection, folder, threads)` in a process, which answers each message with
    `Figures`."""

    def __init__(
        self, name: str, serve: Any, folder: Path, threads: int, environment: dict[str, str]
    ) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, folder, threads), daemon=True
        )
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        self._process.start()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        self._connection.recv()  # loaded

    def turn(self) -> Figures:
        self._connection.send("turn")
        return self._connection.recv()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def serve_engine(connection: Connection, folder: Path, threads: int) -> None:
    with load_engine(
        folder, num_threads=threads, max_model_len=1024, max_num_seqs=max(STREAMS),
        max_num_batched_tokens=PROMPT_TOKENS, enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        prompts = {n: _text_of(engine, n) for n in (SHORT_PROMPT, PROMPT_TOKENS)}
        asyncio.run(_answers(engine, prompts[SHORT_PROMPT], 1, 4))
        connection.send(engine.description())
        while connection.recv():
            asked = time.perf_counter()
            (times,) = asyncio.run(_answers(engine, prompts[PROMPT_TOKENS], 1, 1))
            prefill = times[0] - asked
            speeds = {}
            for streams in STREAMS:
                arrivals = asyncio.run(
                    _answers(engine, prompts[SHORT_PROMPT], streams, DECODE_TOKENS)
                )
                first, last = max(a[0] for a in arrivals), min(a[-1] for a in arrivals)
                tokens = sum(first < moment <= last for a in arrivals for moment in a)
                speeds[streams] = tokens / (last - first)
            connection.send(Figures(prefill, speeds))


def _text_of(engine: Engine, tokens: int) -> str:
    tokenizer = load_tokenizer(engine.spec.tokenizer_path, engine.spec.prompt.tokenization)
    text = ""
    while len(tokenizer.encode(text)) < tokens:
        text += chr(ord("a") + len(text) % 26)
    return text


async def _answers(engine: Engine, prompt: str, streams: int, tokens: int) -> list[list[float]]:
    """When each stream's tokens came."""
    params = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)

    async def answer() -> list[float]:
        times: list[float] = []
        async for delta in engine.stream(prompt, params=params):
            times += [time.perf_counter()] * len(delta.token_ids)
        return times

    return await asyncio.gather(*(answer() for _ in range(streams)))


@torch.inference_mode()
def serve_transformers(connection: Connection, folder: Path, threads: int) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.bfloat16)

    def ids(streams: int, tokens: int) -> torch.Tensor:
        return torch.randint(3, 30000, (streams, tokens))

    connection.send("loaded")
    while connection.recv():
        asked = time.perf_counter()
        model(ids(1, PROMPT_TOKENS), logits_to_keep=1)
        prefill = time.perf_counter() - asked
        speeds = {}
        for streams in STREAMS:
            cache = DynamicCache()
            model(ids(streams, SHORT_PROMPT), past_key_values=cache, logits_to_keep=1)
            started = time.perf_counter()
            tokens = ids(streams, 1)
            for _ in range(DECODE_TOKENS):
                tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
            speeds[streams] = streams * DECODE_TOKENS / (time.perf_counter() - started)
        connection.send(Figures(prefill, speeds))


class LlamaCpp(Arm):
    """llama.cpp's own benchmarks, which load the file anew each time."""

    name = "llama.cpp Q4_0"

    def __init__(self, programs: Path, model: Path, threads: int) -> None:
        self._programs = programs
        self._common = ["-m", str(model), "-t", str(threads)]

    def turn(self) -> Figures:
        output = self._run(
            "llama-bench", "-p", str(PROMPT_TOKENS), "-n", str(DECODE_TOKENS), "-r", "2",
            "-b", str(PROMPT_TOKENS), "-ub", str(PROMPT_TOKENS), "-o", "json",
        )  # fmt: skip
        prompt, decode = (max(test["samples_ts"]) for test in json.loads(output))
        speeds = {1: decode}
        for streams in STREAMS[1:]:
            output = self._run(
                "llama-batched-bench", "-npp", str(SHORT_PROMPT), "-ntg", str(DECODE_TOKENS),
                "-npl", str(streams), "-c", "1024", "--output-format", "jsonl",
            )  # fmt: skip
            lines = [line for line in output.splitlines() if line.startswith("{")]
            speeds[streams] = json.loads(lines[-1])["speed_tg"]
        return Figures(PROMPT_TOKENS / prompt, speeds)

    def close(self) -> None:
        """Nothing runs between turns."""

    def _run(self, program: str, *options: str) -> str:
        command = [str(self._programs / program), *self._common, *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def prepare(folder: Path, size: str) -> Path:
    checkpoint = folder / f"vila-{size}"
    if not checkpoint.exists():
        family: Family = replace(
            FAMILIES["vila1.5-3b"], name=checkpoint.name, language=LANGUAGE[size], tower=TOWER
        )
        synthesize(family, checkpoint, scale="full", progress=True)
    return checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_end_to_end",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for the models' files; reused")
    parser.add_argument("--size", choices=LANGUAGE, default="1b", help="size of the language model")
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each arm"
    )
    parser.add_argument(
        "--turns", type=int, default=TURNS, help="of every arm; figures are medians over them"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/records/NAME.json")
    options = parser.parse_args(arguments)
    checkpoint = prepare(options.folder, options.size)
    busy = busy_cpus()
    threads = options.threads
    arms: list[Arm] = [
        ProcessArm("engine", serve_engine, checkpoint, threads, {}),
        ProcessArm("engine, torch's kernels", serve_engine, checkpoint, threads, {SWITCH: "0"}),
        ProcessArm("transformers", serve_transformers, checkpoint, threads, {}),
    ]
    if options.llama:
        model = options.folder / f"{options.size}.gguf"
        if not model.exists():
            write_q4_0(model, LANGUAGE[options.size], FAMILIES["vila1.5-3b"].vocabulary)
        arms.append(LlamaCpp(options.llama, model, threads))
    turns: dict[str, list[Figures]] = {arm.name: [] for arm in arms}
    for turn in range(options.turns):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            turns[arm.name].append(arm.turn())
            print(turn, arm.name, turns[arm.name][-1], flush=True)
    for arm in arms:
        arm.close()
    figures = {name: summarise(own) for name, own in turns.items()}
    print(f"\n{options.size}, {threads} thread(s), best of {options.turns} turns (median)\n")
    print(f"| | {PROMPT_TOKENS} tokens of prompt, s | " + " | ".join(
        f"{n} stream{'s' if n > 1 else ''}, tokens/s" for n in STREAMS) + " |")  # fmt: skip
    print("|---|" + "---:|" * (len(STREAMS) + 1))
    for name, own in figures.items():
        cells = [own["prefill_s"], *own["decode_per_s"].values()]
        print(f"| {name} | " + " | ".join(
            f"{c['best']:.3g} ({c['median']:.3g})" for c in cells) + " |")  # fmt: skip
    if options.record:
        write_figures(
            options.record, size=options.size, threads=threads, prompt_tokens=PROMPT_TOKENS,
            decode_tokens=DECODE_TOKENS, busy_cpus_before=busy, busy_cpus_after=busy_cpus(),
            arms=figures,
        )  # fmt: skip
    return 0


def summarise(turns: Sequence[Figures]) -> dict[str, Any]:
    prefills = [figures.prefill_s for figures in turns]
    decodes = {n: [figures.decode_per_s[n] for figures in turns] for n in STREAMS}
    return {
        "prefill_s": {"best": min(prefills), "median": statistics.median(prefills)},
        "decode_per_s": {
            str(n): {"best": max(own), "median": statistics.median(own)}
            for n, own in decodes.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
