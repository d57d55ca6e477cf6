"""Tower and projector as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.vision.preprocessing import PreparedImage
from models.vision.projectors import Projector
from models.vision.tower import VisionTower

TILES_PER_BATCH = 16
"""Bounds the activations; more tiles than that go through the tower in turns."""


class VisionEncoder(nn.Module):
    """
    Attributes:
        num_tokens_per_tile: embeddings that one tile becomes.
    """

    def __init__(self, tower: VisionTower, projector: Projector, image_size: int) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.image_size = image_size
        self.num_tokens_per_tile = projector.num_tokens(tower.num_tokens)

    @torch.inference_mode()
    def forward(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """(num_tokens, language model's hidden size) of each picture, tiles in their order."""
        if not images:
            return []
        encoded = self._encode(torch.cat([image.pixel_values for image in images]))
        tokens = [image.num_tokens for image in images]
        return list(encoded.flatten(0, 1).split(tokens))

    @torch.inference_mode()
    def profile(self, num_tiles: int) -> None:
        """Runs as many tiles as a step may hold, so that their memory is accounted for."""
        self._encode(torch.zeros(num_tiles, 3, self.image_size, self.image_size))

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, S, S) -> (tiles, num_tokens_per_tile, hidden)."""
        parameter = next(self.parameters())
        batches = pixel_values.split(TILES_PER_BATCH)
        return torch.cat([
            self.projector(self.tower(batch.to(parameter.device, parameter.dtype)))
            for batch in batches
        ])  # fmt: skip
