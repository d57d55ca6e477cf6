"""Pictures -> embeddings in the language model's space: preprocessing, tower, projector."""

from __future__ import annotations

from models.vision.encoder import VisionEncoder
from models.vision.loading import load_vision
from models.vision.preprocessing import ImagePreprocessor, PreparedImage

__all__ = ["ImagePreprocessor", "PreparedImage", "VisionEncoder", "load_vision"]
