"""A checkpoint's tower and projector -> a VisionEncoder on its device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import init_empty_weights

from models.checkpoints.parameters import load_parameter
from models.checkpoints.spec import Checkpoint
from models.checkpoints.weight_source import WeightSource
from models.vision.encoder import VisionEncoder

NEWLINE = "image_newline"


def load_vision(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """
    Raises:
        CheckpointError: a tensor is missing, left over or misshaped, or the projector's kind is
            unknown.
    """
    spec = checkpoint.spec
    with init_empty_weights():
        encoder = VisionEncoder(spec.vision, spec.projector)
    tower = {name: f"tower.{name}" for name, _ in encoder.tower.named_parameters()}
    projector = {name: f"projector.{name}" for name, _ in encoder.projector.named_parameters()}
    if encoder.image_newline is not None:
        projector[NEWLINE] = NEWLINE
    _fill(encoder, tower, checkpoint.vision, device, dtype, unused=encoder.tower.unused)
    _fill(encoder, projector, checkpoint.projector, device, dtype)
    return encoder.to(device).eval().requires_grad_(False)


def _fill(
    encoder: VisionEncoder,
    names: Mapping[str, str],
    source: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    unused: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """
    Args:
        names: the source's -> the encoder's.
    """
    source.check(
        {own: tuple(encoder.get_parameter(name).shape) for own, name in names.items()},
        unused=unused,
    )
    for own, name in names.items():
        load_parameter(encoder, name, [own], source, device=device, dtype=dtype)
