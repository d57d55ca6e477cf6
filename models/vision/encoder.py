"""Tower and projector as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.checkpoints.spec import ProjectorSpec, VisionSpec
from models.errors import CheckpointError
from models.transfer import upload
from models.vision.anyres import TileGrid
from models.vision.merging import merge_tiles
from models.vision.preprocessing import PreparedImage
from models.vision.projectors import build_projector
from models.vision.tower import VisionTower

TILES_PER_BATCH = 16
"""Bounds the activations; more tiles than that go through the tower in turns."""


class VisionEncoder(nn.Module):
    """
    Attributes:
        image_newline: (hidden,), behind each row of a picture that is merged by "spatial_unpad".
        num_tokens_per_tile: embeddings that one tile becomes.
    """

    def __init__(self, vision: VisionSpec, projector: ProjectorSpec) -> None:
        """
        Raises:
            CheckpointError: the projector is unknown, or cannot follow this tower, or its tokens
                cannot be merged as they should.
        """
        super().__init__()
        self.tower = VisionTower(vision)
        self.projector = build_projector(projector)
        self.num_tokens_per_tile = self.projector.num_tokens(self.tower.num_tokens)
        self.preprocessing = vision.preprocessing
        self.merge = projector.merge
        self.image_newline = (
            nn.Parameter(torch.empty(projector.out_features))
            if self.merge == "spatial_unpad"
            else None
        )
        if self.merge != "flat" and vision.preprocessing.mode == "anyres":
            self._check_mergeable(projector)

    @torch.inference_mode()
    def forward(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """(num_tokens, language model's hidden size) of each picture."""
        if not images:
            return []
        encoded = self._encode([tile for image in images for tile in image.pixel_values])
        per_image = encoded.split([len(image.pixel_values) for image in images])
        return [
            merge_tiles(tiles, image.grid, self.merge, self.image_newline)
            for tiles, image in zip(per_image, images, strict=True)
        ]

    @torch.inference_mode()
    def profile(self, num_images: int) -> None:
        """Runs as many pictures as a step may hold, each of the most tiles that one can have, so
        that their memory is accounted for."""
        side = self.preprocessing.crop_size
        grids = [
            TileGrid(height // side, width // side)
            for width, height in self.preprocessing.grid_pinpoints
        ]
        grid = max(grids, key=lambda grid: grid.rows * grid.columns, default=None)
        num_tiles = 1 if grid is None else 1 + grid.rows * grid.columns
        image = PreparedImage(torch.zeros(num_tiles, 3, side, side), 0, b"", grid)
        self([image] * num_images)

    def _encode(self, tiles: Sequence[Tensor]) -> Tensor:
        """(3, S, S) each -> (tiles, num_tokens_per_tile, hidden)."""
        parameter = next(self.parameters())
        batches = (
            torch.stack([*tiles[start : start + TILES_PER_BATCH]])
            for start in range(0, len(tiles), TILES_PER_BATCH)
        )
        return torch.cat([
            self.projector(self.tower(upload(batch, parameter.device, parameter.dtype)))
            for batch in batches
        ])  # fmt: skip

    def _check_mergeable(self, projector: ProjectorSpec) -> None:
        count = self.num_tokens_per_tile
        if math.isqrt(count) ** 2 != count:
            raise CheckpointError(
                f"mm_patch_merge_type {self.merge} needs a square grid of tokens, and a tile has "
                f"{count} (mm_vision_select_feature: patch leaves the class token out)"
            )
        if projector.token_order != "row":
            raise CheckpointError(
                f"mm_patch_merge_type {self.merge} needs tokens row by row, and the projector "
                f"emits them {projector.token_order} by {projector.token_order}"
            )
