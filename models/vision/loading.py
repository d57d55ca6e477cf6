"""A checkpoint's tower and projector -> a VisionEncoder on its device."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from models.checkpoints.spec import Checkpoint
from models.checkpoints.weight_source import WeightSource
from models.vision.encoder import VisionEncoder
from models.vision.projectors import PROJECTORS
from models.vision.tower import VisionTower


def load_vision(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """
    Raises:
        CheckpointError: a tensor is missing, left over or misshaped, or the projector's kind is
            unknown.
    """
    spec = checkpoint.spec
    build_projector = PROJECTORS[spec.projector.kind]
    with init_empty_weights():
        tower = VisionTower(spec.vision)
        projector = build_projector(spec.projector)
    _fill(tower, checkpoint.vision, device, dtype, unused=tower.unused)
    _fill(projector, checkpoint.projector, device, dtype)
    encoder = VisionEncoder(tower, projector, spec.vision.preprocessing.crop_size)
    return encoder.to(device).eval().requires_grad_(False)


def _fill(
    module: nn.Module,
    source: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    unused: dict[str, tuple[int, ...]] | None = None,
) -> None:
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    source.check(shapes, unused=unused)
    for name in shapes:
        set_module_tensor_to_device(module, name, device, value=source.get(name), dtype=dtype)
