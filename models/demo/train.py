"""Trains the demo model from nothing and writes its checkpoint.

    python -m models.demo.train [--schedule short|long|quick] [--output FOLDER]

First the tower alone learns what lies on each patch, then everything together learns to answer, in
several rounds. Some dwell on pictures that come after their question, and on what answers alone do
not teach there: which words and patches are what is asked about, and which are what that is
compared with.

The short schedule takes some 40 minutes on two cores and answers 94.6 % of the held-out questions;
the long one takes two hours, and 98.6 %.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.func import functional_call
from tqdm import tqdm

from models.command_line import HelpFormatter
from models.demo.batches import batches_ahead, make_batches
from models.demo.export import export_checkpoint
from models.demo.labels import WORDS
from models.demo.network import Batch, Losses, Network, NetworkConfig
from models.demo.optimizer import Optimizer
from models.demo.progress import exact_matches, table
from models.demo.questions import LAST_WEIGHTS
from models.demo.teacher import load_network
from models.demo.tokenizer import train_tokenizer, word_ids


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        rows: in a step, each about one picture.
        muon_rate, adam_rate: at their peak; the tower's are `tower_factor` of them.
        patches_weight, words_weight, roles_weight: of the auxiliary losses; the answers' is 1.
        least: share of the peak rates at the end.
        last_share: of the rows whose questions come before the picture. Fewer of these fit into a
            row, and they need other ways of looking, which come later.
        last_sides: the weight of sides among those questions.
        tower_only: the language model's layers rest.
    """

    name: str
    steps: int
    rows: int = 48
    muon_rate: float = 3.6e-3
    adam_rate: float = 1.5e-3
    tower_factor: float = 0.4
    patches_weight: float = 0.2
    words_weight: float = 0.2
    roles_weight: float = 0.0
    least: float = 0.01
    last_share: float = 0.28
    last_sides: float = LAST_WEIGHTS["side"]
    tower_only: bool = False


@dataclass(frozen=True)
class Schedule:
    """
    Attributes:
        phases: one after the other, each with a rise and a fall of the rates.
        warmup: steps of a rise.
        clip: the gradient's norm at most.
        check_every: steps between looks at held-out answers, for which `check_rows` are made.
        save_every: steps between checkpoints.
    """

    phases: tuple[Phase, ...] = (
        Phase(
            "tower", 350, rows=128, muon_rate=4.5e-3, tower_factor=1.0, patches_weight=1.0,
            words_weight=1.0, least=0.3, tower_only=True,
        ),
        Phase("joint", 1800, roles_weight=0.5, last_share=0.6, last_sides=8.0, least=0.1),
        Phase(
            "roles", 600, muon_rate=3.0e-3, adam_rate=1.2e-3, patches_weight=0.0, roles_weight=0.5,
            last_share=0.9, last_sides=16.0,
        ),
        Phase(
            "all again", 320, muon_rate=1.6e-3, adam_rate=0.7e-3, patches_weight=0.0,
            roles_weight=0.2, last_share=0.4,
        ),
    )  # fmt: skip
    warmup: int = 40
    clip: float = 1.0
    check_every: int = 150
    check_rows: int = 240
    save_every: int = 300


LONG = Schedule(
    phases=(
        Phase(
            "tower", 450, rows=128, muon_rate=4.5e-3, tower_factor=1.0, patches_weight=1.0,
            words_weight=1.0, least=0.3, tower_only=True,
        ),
        Phase("joint", 1500),
        Phase("joint again", 1000, muon_rate=1.8e-3, adam_rate=0.8e-3, patches_weight=0.0),
        Phase(
            "picture last", 900, muon_rate=1.6e-3, adam_rate=0.7e-3, patches_weight=0.0,
            last_share=0.65,
        ),
        Phase(
            "picture last again", 1000, muon_rate=1.8e-3, adam_rate=0.8e-3, patches_weight=0.0,
            last_share=0.8,
        ),
        Phase(
            "sides", 900, muon_rate=2.2e-3, adam_rate=1.0e-3, patches_weight=0.0,
            last_share=0.85, last_sides=16.0,
        ),
        Phase(
            "roles", 900, muon_rate=3.0e-3, adam_rate=1.2e-3, patches_weight=0.0, roles_weight=0.5,
            last_share=0.9, last_sides=16.0,
        ),
        Phase(
            "all again", 320, muon_rate=1.6e-3, adam_rate=0.7e-3, patches_weight=0.0,
            roles_weight=0.2, last_share=0.4,
        ),
    )
)  # fmt: skip
"""Two hours on two cores. The checkpoint that is shipped came from it."""

QUICK = Schedule(
    phases=tuple(replace(phase, steps=6, rows=8) for phase in Schedule().phases),
    warmup=2, check_every=4, check_rows=16, save_every=5,
)  # fmt: skip
"""Two minutes, mostly of compiling: every part runs, and nothing is learned."""

SCHEDULES = {"short": Schedule(), "long": LONG, "quick": QUICK}


@dataclass(frozen=True)
class Trainer:
    """
    Attributes:
        output: where the checkpoint goes, now and then and at the end.
    """

    network: Network
    tokenizer: Tokenizer
    schedule: Schedule
    output: Path
    seed: int
    compiled: bool = True

    @classmethod
    def from_nothing(cls, schedule: Schedule, output: Path, seed: int) -> Trainer:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(seed)
        config = NetworkConfig(vocabulary=tokenizer.get_vocab_size())
        network = Network(config, [word_ids(tokenizer, words) for words in WORDS])
        return cls(network, tokenizer, schedule, output, seed)

    @classmethod
    def from_checkpoint(cls, folder: Path, schedule: Schedule, output: Path, seed: int) -> Trainer:
        """With its weights and tokenizer; the heads of the auxiliary losses start anew."""
        torch.manual_seed(seed)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        network = load_network(folder, "W16A16").requires_grad_(True)
        network.words = [torch.tensor(word_ids(tokenizer, words)) for words in WORDS]
        return cls(network, tokenizer, schedule, output, seed)

    def train(self) -> None:
        started = time.monotonic()
        for phase in self.schedule.phases:
            seed = f"{phase.name}:{self.seed}"
            with batches_ahead(
                self.tokenizer, phase.rows, seed, phase.last_share, phase.last_sides
            ) as batches:
                self._run(phase, batches)
            minutes = (time.monotonic() - started) / 60
            print(f"{phase.name}: done after {minutes:.1f} minutes", flush=True)
            export_checkpoint(self.network, self.tokenizer, self.output)

    def _run(self, phase: Phase, batches: Iterator[Batch]) -> None:
        schedule = self.schedule
        optimizer = Optimizer(
            self.network, muon_rate=phase.muon_rate, adam_rate=phase.adam_rate,
            tower_factor=phase.tower_factor,
        )  # fmt: skip
        run = _runner(self.network, self.compiled, phase.tower_only)
        held_out = next(
            make_batches(self.tokenizer, schedule.check_rows, "check", phase.last_share)
        )
        bar = tqdm(
            islice(batches, phase.steps), phase.name, phase.steps, unit="step", mininterval=2
        )
        for step, batch in enumerate(bar, start=1):
            losses = run(batch)
            total = (
                losses.answers
                + phase.patches_weight * losses.patches
                + phase.words_weight * losses.words
                + phase.roles_weight * losses.roles.sum()
            )
            self.network.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), schedule.clip)
            optimizer.step(_share(step - 1, phase.steps, schedule.warmup, phase.least))
            bar.set_postfix(_figures(losses), refresh=False)
            if phase.tower_only:
                continue
            if step % schedule.check_every == 0:
                matches = exact_matches(self.network, held_out, self.tokenizer)
                bar.write(f"step {step}: {table(matches)}", file=sys.stderr)
            if step % schedule.save_every == 0:
                export_checkpoint(self.network, self.tokenizer, self.output)


def _runner(network: Network, compiled: bool, tower_only: bool) -> Callable[[Batch], Losses]:
    """Computes with the parameters rounded to bfloat16; gradients reach them in float32."""

    def run(batch: Batch) -> Losses:
        rounded = {name: value.bfloat16() for name, value in network.named_parameters()}
        return Losses(*functional_call(network, rounded, (batch, tower_only)))

    return torch.compile(run, dynamic=False) if compiled else run


def _figures(losses: Losses) -> dict[str, str]:
    return {
        name: ",".join(f"{one:.3f}" for one in value.flatten().tolist())
        for name, value in losses._asdict().items()
    }


def _share(step: int, steps: int, warmup: int, least: float) -> float:
    """Of the peak rate: a linear rise, then half a cosine down to `least`."""
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * along))


def _with_passive_threads() -> None:
    """Restarts Python with threads that sleep rather than spin while they wait: the process that
    draws pictures needs the cores meanwhile. OpenMP reads this once, when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        arguments = [sys.executable, "-m", "models.demo.train", *sys.argv[1:]]
        os.execve(sys.executable, arguments, environment)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.train",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("llava-demo"),
        metavar="FOLDER",
        help="where the checkpoint goes, now and then and at the end",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and questions")
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="short",
        help="short: 40 minutes; long: two hours, as the shipped checkpoint; quick: only to see "
        "that it all runs",
    )  # fmt: skip
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument(
        "--phase", help="the first phase that runs; with --start, by default the last"
    )
    options = parser.parse_args(arguments)
    schedule = SCHEDULES[options.schedule]
    names = [phase.name for phase in schedule.phases]
    first = options.phase or names[-1 if options.start else 0]
    if first not in names:
        parser.error(f"--phase: there is no {first!r}; there are {', '.join(names)}")
    schedule = replace(schedule, phases=schedule.phases[names.index(first) :])
    if options.start is None:
        trainer = Trainer.from_nothing(schedule, options.output, options.seed)
    else:
        trainer = Trainer.from_checkpoint(options.start, schedule, options.output, options.seed)
    trainer.train()


if __name__ == "__main__":
    _with_passive_threads()
    main()
