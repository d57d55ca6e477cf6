"""A picture -> the tower's pixels, equal to transformers' PIL-based processors.

Resizing is PIL's, on bytes. Pixels are rounded to fp16, as in the original code, where skipping
that moves logits by up to 3e-3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.checkpoints.spec import PreprocessingSpec
from models.vision.rgb import to_rgb

LONGEST_EDGE = 4096
"""Pixels, of intermediate pictures. Beyond it, a thin strip sent to be padded or cropped would
take memory by the square of its length."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """
    Attributes:
        pixel_values: (tiles, 3, S, S) float32, of fp16 precision, normalised.
        num_tokens: that the tower and projector make of it.
        digest: equal only for pictures that the tower cannot tell apart.
    """

    pixel_values: Tensor
    num_tokens: int
    digest: bytes


@dataclass(frozen=True)
class ImagePreprocessor:
    """Safe to call from several threads at once, on different pictures."""

    spec: PreprocessingSpec
    tokens_per_tile: int

    @property
    def min_tokens(self) -> int:
        """The fewest tokens that a picture can have."""
        return self.tokens_per_tile

    def __call__(self, image: Image.Image) -> PreparedImage:
        square = self._square(to_rgb(image))
        pixels = np.asarray(square)
        values = np.stack([self._table[channel][pixels[..., channel]] for channel in range(3)])
        pixel_values = torch.from_numpy(values[None])
        return PreparedImage(
            pixel_values, self.tokens_per_tile * len(pixel_values), self._digest(values)
        )

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

    def _digest(self, values: np.ndarray) -> bytes:
        """Over what the tower is given, with its shape; and over how it came to be."""
        digest = hashlib.sha256(f"{self.spec}{self.tokens_per_tile}{values.shape}".encode())
        digest.update(values.tobytes())
        return digest.digest()

    def _square(self, image: Image.Image) -> Image.Image:
        side = self.spec.crop_size
        if self.spec.mode == "pad":
            image = self._padded(image)
        elif self.spec.mode == "resize":
            image = self._resized(image, (side, side))
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
