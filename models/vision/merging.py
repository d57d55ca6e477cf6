"""A picture's tiles, each encoded by itself -> the tokens that stand for it in the prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.checkpoints.spec import PatchMerge
from models.vision.anyres import TileGrid


def merge_tiles(
    tiles: Tensor, grid: TileGrid | None, merge: PatchMerge, image_newline: Tensor | None
) -> Tensor:
    """(tiles, tokens per tile, hidden) -> (num_tokens, hidden).

    Args:
        tiles: first the whole picture, then the grid's, row by row.
        grid: None for a picture that is not cut into tiles, whose tokens stay as they are.
        image_newline: (hidden,), of "spatial_unpad".
    """
    if grid is None or merge == "flat":
        return tiles.flatten(0, 1)
    side = math.isqrt(tiles.shape[1])
    plane = tiles[1:].unflatten(1, (side, side)).unflatten(0, (grid.rows, grid.columns))
    # row of tiles, row in the tile, column of tiles, column in the tile
    plane = plane.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    if image_newline is not None:
        y, x = grid.blank_rows, grid.blank_columns
        plane = plane[y : len(plane) - y, x : plane.shape[1] - x]
        plane = torch.cat([plane, image_newline.expand(len(plane), 1, -1)], dim=1)
    return torch.cat([tiles[0], plane.flatten(0, 1)])
