"""A picture -> the tower's pixels, equal to transformers' PIL-based processors.

Resizing is PIL's, on bytes. Pixels are rounded to fp16, as in the original code, where skipping
that moves logits by up to 3e-3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.checkpoints.spec import PatchMerge, PreprocessingSpec
from models.vision.anyres import Size, TileGrid, choose_pinpoint, fit
from models.vision.rgb import to_rgb

LONGEST_EDGE = 4096
"""Pixels, of intermediate pictures. Beyond it, a thin strip sent to be padded or cropped would
take memory by the square of its length."""

THINNEST = ((2**31, 1), (1, 2**31))
"""Sizes of pictures that have the fewest tokens in their grid of tiles."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """
    Attributes:
        pixel_values: (tiles, 3, S, S) float32, of fp16 precision, normalised.
        num_tokens: that the tower and projector make of it.
        digest: equal only for pictures that become the same tokens.
        grid: of the tiles behind the first one, which shows the whole picture; None for a picture
            that is not cut into tiles.
    """

    pixel_values: Tensor
    num_tokens: int
    digest: bytes
    grid: TileGrid | None = None


@dataclass(frozen=True)
class ImagePreprocessor:
    """Safe to call from several threads at once, on different pictures.

    Attributes:
        tokens_per_tile: that tower and projector make of a square.
        merge: how the encoder joins a picture's tiles.
    """

    spec: PreprocessingSpec
    tokens_per_tile: int
    merge: PatchMerge = "flat"

    @cached_property
    def min_tokens(self) -> int:
        """No picture has fewer tokens."""
        if self.spec.mode != "anyres":
            return self.tokens_per_tile
        return min(
            self._num_tokens(self._grid(strip, pinpoint))
            for pinpoint in self.spec.grid_pinpoints
            for strip in THINNEST
        )

    def __call__(self, image: Image.Image) -> PreparedImage:
        squares, grid = self._squares(to_rgb(image))
        values = np.stack([self._normalised(square) for square in squares])
        return PreparedImage(
            torch.from_numpy(values), self._num_tokens(grid), self._digest(values, grid), grid
        )

    def _squares(self, image: Image.Image) -> tuple[list[Image.Image], TileGrid | None]:
        if self.spec.mode != "anyres":
            return [self._square(image)], None
        pinpoint = choose_pinpoint(image.size, self.spec.grid_pinpoints)
        whole = self._resized(image, (self.spec.size, self.spec.size))
        squares = [self._processed(tile) for tile in (whole, *self._tiles(image, pinpoint))]
        return squares, self._grid(image.size, pinpoint)

    def _grid(self, picture: Size, pinpoint: Size) -> TileGrid:
        return TileGrid.of(picture, pinpoint, self.spec.crop_size, self.tokens_per_tile)

    def _num_tokens(self, grid: TileGrid | None) -> int:
        if grid is None:
            return self.tokens_per_tile
        return grid.num_tokens(self.tokens_per_tile, self.merge)

    @cached_property
    def _table(self) -> np.ndarray:
        """(3, 256) float32: the normalised value of each byte, in transformers' own steps."""
        scaled = (np.arange(256, dtype=np.float64) * self.spec.rescale_factor).astype(np.float32)
        mean, std = (
            np.array(channels, dtype=np.float32)[:, None]
            for channels in (self.spec.mean, self.spec.std)
        )
        normalised: np.ndarray = ((scaled - mean) / std).astype(np.float16).astype(np.float32)
        return normalised

    def _normalised(self, square: Image.Image) -> np.ndarray:
        """(3, S, S) float32."""
        pixels = np.asarray(square)
        return np.stack([self._table[channel][pixels[..., channel]] for channel in range(3)])

    def _digest(self, values: np.ndarray, grid: TileGrid | None) -> bytes:
        """Over what the tower is given, with its shape; over how it came to be; and over what
        becomes of it."""
        process = f"{self.spec}{self.tokens_per_tile}{self.merge}{grid}{values.shape}"
        digest = hashlib.sha256(process.encode())
        digest.update(values.tobytes())
        return digest.digest()

    def _square(self, image: Image.Image) -> Image.Image:
        side = self.spec.crop_size
        if self.spec.mode == "pad":
            image = self._padded(image)
        elif self.spec.mode == "resize":
            image = self._resized(image, (side, side))
        return self._processed(image)

    def _tiles(self, image: Image.Image, pinpoint: Size) -> Iterator[Image.Image]:
        """Row by row, of the picture in the middle of a black canvas of the pinpoint's size."""
        fitted = self._resized(image, fit(image.size, pinpoint))
        width, height = pinpoint
        canvas = Image.new("RGB", pinpoint)
        canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        side = self.spec.crop_size
        for top in range(0, height, side):
            for left in range(0, width, side):
                yield canvas.crop((left, top, left + side, top + side))

    def _processed(self, image: Image.Image) -> Image.Image:
        """What the checkpoint's image processor does of itself."""
        side = self.spec.crop_size
        if self.spec.resize == "shortest_edge":
            return self._shortest_edge_then_crop(image)
        square = self._resized(image, (self.spec.size, self.spec.size))
        margin = (self.spec.size - side) // 2
        return square.crop((margin, margin, margin + side, margin + side))

    def _padded(self, image: Image.Image) -> Image.Image:
        """In the middle of a square of the mean colour. Longer edges than 4096 are shrunk first,
        where the original code would build the whole square."""
        longest = max(image.size)
        if longest > LONGEST_EDGE:
            shrunk = [max(1, round(edge * LONGEST_EDGE / longest)) for edge in image.size]
            image = self._resized(image, (shrunk[0], shrunk[1]))
            longest = LONGEST_EDGE
        width, height = image.size
        if width == height:
            return image
        red, green, blue = (int(mean * 255) for mean in self.spec.mean)
        canvas = Image.new("RGB", (longest, longest), (red, green, blue))
        canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
        return canvas

    def _shortest_edge_then_crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side, shortest = self.spec.crop_size, self.spec.size
        longest = int(shortest * max(image.size) / min(image.size))
        size = (shortest, longest) if width <= height else (longest, shortest)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        if longest <= LONGEST_EDGE:
            return self._resized(image, size).crop((left, top, left + side, top + side))
        # The same pixels without the rest of the strip.
        x, y = width / size[0], height / size[1]
        box = (
            left * x,
            top * y,
            min((left + side) * x, width),
            min((top + side) * y, height),
        )
        return image.resize((side, side), Image.Resampling(self.spec.resample), box=box)

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, Image.Resampling(self.spec.resample))
