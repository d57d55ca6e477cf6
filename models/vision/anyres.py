"""LLaVA-1.6's pictures of any resolution: the whole, and a grid of tiles that shows it larger.

The geometry is that of LLaVA's `mm_utils.py` and `llava_arch.py`, and of transformers' LLaVA-NeXT.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from models.checkpoints.spec import PatchMerge

Size: TypeAlias = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class TileGrid:
    """How the tiles behind a picture's first one make up a plane of tokens.

    Attributes:
        rows, columns: of tiles.
        blank_rows, blank_columns: of tokens, at either edge, that show nothing but padding.
    """

    rows: int
    columns: int
    blank_rows: int = 0
    blank_columns: int = 0

    @classmethod
    def of(cls, picture: Size, pinpoint: Size, tile: int, tokens_per_tile: int) -> TileGrid:
        """In whole numbers, which is as transformers rounds. LLaVA cuts a float off instead, and so
        loses two rows or columns of a few pictures, such as 1056 x 220.

        Args:
            picture: before any resizing.
            pinpoint: the resolution that it is fitted into.
            tile: pixels of a tile's side.
        """
        columns, rows = pinpoint[0] // tile, pinpoint[1] // tile
        side = math.isqrt(tokens_per_tile)
        height, width = rows * side, columns * side
        if picture[0] * height > width * picture[1]:
            shown = picture[1] * width // picture[0]
            return cls(rows, columns, blank_rows=(height - shown) // 2)
        shown = picture[0] * height // picture[1]
        return cls(rows, columns, blank_columns=(width - shown) // 2)

    def num_tokens(self, tokens_per_tile: int, merge: PatchMerge) -> int:
        """Of the whole picture, its first tile included, as `merge_tiles` makes them."""
        if merge != "spatial_unpad":
            return tokens_per_tile * (1 + self.rows * self.columns)
        side = math.isqrt(tokens_per_tile)
        rows = self.rows * side - 2 * self.blank_rows
        columns = self.columns * side - 2 * self.blank_columns
        return tokens_per_tile + rows * (columns + 1)


def choose_pinpoint(picture: Size, pinpoints: Iterable[Size]) -> Size:
    """The one that shows most of the picture's pixels; of several, the smallest, then the first.

    In upstream's floats: their rounding decides between resolutions that are nearly as good.
    """
    width, height = picture

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, -pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def fit(picture: Size, pinpoint: Size) -> Size:
    """As large as the aspect ratio allows, and at least one pixel wide and high."""
    width, height = picture
    across, down = pinpoint[0] / width, pinpoint[1] / height
    if across < down:
        return pinpoint[0], min(math.ceil(height * across), pinpoint[1])
    return min(math.ceil(width * down), pinpoint[0]), pinpoint[1]
