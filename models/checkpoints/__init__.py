"""A folder on disk, or a Hub id -> what the model is (ModelSpec) and where its tensors lie."""

from __future__ import annotations

from models.checkpoints.opening import open_checkpoint
from models.checkpoints.spec import (
    Checkpoint,
    ModelSpec,
    PreprocessingSpec,
    ProjectorSpec,
    PromptSpec,
    VisionSpec,
)
from models.checkpoints.weight_source import WeightSource

__all__ = [
    "Checkpoint",
    "ModelSpec",
    "PreprocessingSpec",
    "ProjectorSpec",
    "PromptSpec",
    "VisionSpec",
    "WeightSource",
    "open_checkpoint",
]
