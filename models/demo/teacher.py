"""The loss of true answers under a stored checkpoint, token by token, in float32.

It tells apart what accuracy cannot: two ways of quantising that both answer nearly all questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints import open_checkpoint
from models.checkpoints.spec import Precision
from models.demo.batches import PREPROCESSING, stacked
from models.demo.held_out import HeldOut
from models.demo.labels import SIZES
from models.demo.network import Batch, Network, NetworkConfig
from models.demo.packing import NO_TARGET, PICTURE_TOKENS, Encoder, Tree, lay_out
from models.vision.preprocessing import ImagePreprocessor

ROWS = 48
"""Of a batch."""


def load_network(folder: Path, precision: Precision) -> Network:
    """The training network with a checkpoint's weights; 4-bit ones as they are after rounding.

    Raises:
        CheckpointError: the files cannot be read.
    """
    checkpoint = open_checkpoint(folder, None, precision)
    network = Network(NetworkConfig(vocabulary=checkpoint.spec.language.vocab_size))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("projector."):
                value = checkpoint.projector.get(name.removeprefix("projector."))
            elif name.startswith("tower."):
                value = checkpoint.vision.get(_clip_name(name.removeprefix("tower.")))
            elif name.startswith(("patch_head.", "role_heads.")):
                continue  # of training only
            else:
                stored = name if name.startswith("lm_head.") else f"model.{name}"
                layer = stored.removesuffix(".weight")
                if checkpoint.language.is_quantized(layer):
                    value = checkpoint.language.quantized(layer).dequantize(torch.float32)
                else:
                    value = checkpoint.language.get(stored)
            parameter.copy_(value.reshape(parameter.shape))
    return network.eval().requires_grad_(False)


def answer_losses(
    network: Network, tokenizer: Tokenizer, items: Sequence[HeldOut]
) -> Iterator[tuple[float, int]]:
    """(the sum over the answer's tokens, how many they are) for each item's last answer."""
    encoder = Encoder(tokenizer)
    preprocessor = ImagePreprocessor(PREPROCESSING, PICTURE_TOKENS)
    for start in range(0, len(items), ROWS):
        chunk = items[start : start + ROWS]
        batch, owners = _batch(encoder, preprocessor, chunk)
        with torch.inference_mode():
            logits = network.logits(batch)
        losses = F.cross_entropy(logits, batch.target, reduction="none").double()
        sums = torch.zeros(len(chunk), dtype=torch.float64).index_add_(0, owners, losses)
        counts = torch.bincount(owners, minlength=len(chunk))
        yield from zip(sums.tolist(), counts.tolist(), strict=True)


def _batch(
    encoder: Encoder, preprocessor: ImagePreprocessor, chunk: Sequence[HeldOut]
) -> tuple[Batch, Tensor]:
    """One dialogue a row, and the row of each target."""
    trees = []
    for item in chunk:
        branch = encoder.dialogue(item.dialogue)
        last = len(encoder.answer(item.question.answer))
        branch.learned[:-last] = [False] * (len(branch.ids) - last)
        trees.append(Tree(branch))
    longest = max(map(len, trees))
    rows = [lay_out([tree], longest) for tree in trees]
    side = PREPROCESSING.crop_size
    pixels = torch.cat([
        torch.zeros(1, 3, side, side) if item.image is None
        else preprocessor(item.image).pixel_values
        for item in chunk
    ])  # fmt: skip
    targets = np.stack([row.target for row in rows])
    owners, _ = np.nonzero(targets != NO_TARGET)
    at = np.flatnonzero(targets != NO_TARGET)
    batch = Batch(
        pixels=pixels,
        labels=torch.zeros(len(chunk), PICTURE_TOKENS, len(SIZES), dtype=torch.int64),
        target_at=torch.from_numpy(at),
        target=torch.from_numpy(targets.reshape(-1)[at]),
        **stacked(rows),
    )
    return batch, torch.from_numpy(owners)


def _clip_name(name: str) -> str:
    if name == "patch_embedding.weight":
        return "embeddings.patch_embedding.weight"
    if name == "position_embedding":
        return "embeddings.position_embedding.weight"
    if name == "class_embedding":
        return "embeddings.class_embedding"
    return f"encoder.{name}" if name.startswith("layers.") else name
