"""Batches, made ahead in a process of their own so that training never waits for a picture."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty, Full
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints.spec import PreprocessingSpec
from models.demo.labels import patch_labels
from models.demo.network import Batch
from models.demo.packing import NO_TARGET, PICTURE_TOKENS, Row, RowMaker
from models.demo.questions import LAST_WEIGHTS
from models.demo.sampling import TOWER_SIDE, photograph, random_scene
from models.vision.preprocessing import ImagePreprocessor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSING = PreprocessingSpec(
    mode="pad", resize="shortest_edge", size=TOWER_SIDE, crop_size=TOWER_SIDE,
    mean=CLIP_MEAN, std=CLIP_STD,
)  # fmt: skip
"""As it is served; `export.py` writes it into the checkpoint."""
TARGETS_PER_ROW = 40
"""Places kept for answers' tokens, per row of a batch."""
AHEAD = 12
"""Batches that wait at most."""
PATIENCE_S = 5.0


def make_batches(
    tokenizer: Tokenizer,
    rows: int,
    seed: str,
    last_share: float = 0.28,
    last_sides: float = LAST_WEIGHTS["side"],
) -> Iterator[Batch]:
    """Without end, and the same for the same seed.

    Args:
        last_share: of the rows whose questions come before the picture.
        last_sides: the weight of questions about sides among those.
    """
    preprocessor = ImagePreprocessor(PREPROCESSING, PICTURE_TOKENS)
    maker = RowMaker(tokenizer, Random(f"rows:{seed}"), last_share, last_sides)
    for index in count():
        rng = Random(f"scenes:{seed}:{index}")
        scenes = [random_scene(rng) for _ in range(rows)]
        made = [maker.row(scene) for scene in scenes]
        pixels = torch.cat([
            preprocessor(photograph(scene, rng)).pixel_values for scene in scenes
        ])  # fmt: skip
        targets = np.stack([row.target for row in made]).reshape(-1)
        at = np.flatnonzero(targets != NO_TARGET)[: rows * TARGETS_PER_ROW]
        target_at = np.zeros(rows * TARGETS_PER_ROW, dtype=np.int64)
        target = np.full(rows * TARGETS_PER_ROW, NO_TARGET, dtype=np.int64)
        target_at[: len(at)], target[: len(at)] = at, targets[at]
        yield Batch(
            pixels=pixels.bfloat16(),
            labels=torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
            target_at=torch.from_numpy(target_at),
            target=torch.from_numpy(target),
            **stacked(made),
        )


def stacked(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The rows' arrays, those that a batch has under the same names."""
    names = ("ids", "picture", "position", "tree", "branch", "role")
    return {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names
    }


@contextmanager
def batches_ahead(
    tokenizer: Tokenizer,
    rows: int,
    seed: str,
    last_share: float = 0.28,
    last_sides: float = LAST_WEIGHTS["side"],
) -> Iterator[Iterator[Batch]]:
    """`make_batches` in another process."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[Any] = context.Queue(AHEAD)
    stop = context.Event()
    worker = context.Process(
        target=_work,
        args=(tokenizer.to_str(), rows, seed, last_share, last_sides, queue, stop),
        daemon=True,
    )
    worker.start()

    def received() -> Iterator[Batch]:
        while True:
            try:
                words, *arrays = map(torch.from_numpy, queue.get(timeout=PATIENCE_S))
            except Empty:
                if worker.is_alive():
                    continue
                raise RuntimeError("the process that draws the pictures has died") from None
            # numpy has no bfloat16.
            yield Batch(words.view(torch.bfloat16), *arrays)

    try:
        yield received()
    finally:
        stop.set()
        worker.join()
        queue.close()


def _work(
    tokenizer: str,
    rows: int,
    seed: str,
    last_share: float,
    last_sides: float,
    queue: Queue[Any],
    stop: Event,
) -> None:
    torch.set_num_threads(1)
    os.nice(5)
    parent = os.getppid()
    read = Tokenizer.from_str(tokenizer)
    for batch in make_batches(read, rows, seed, last_share, last_sides):
        message = [batch.pixels.view(torch.int16).numpy(), *(part.numpy() for part in batch[1:])]
        sent = False
        while not sent:
            if stop.is_set() or os.getppid() != parent:
                queue.cancel_join_thread()  # nobody will read what waits in it
                return
            try:
                queue.put(message, timeout=1)
                sent = True
            except Full:
                continue
