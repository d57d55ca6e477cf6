"""A step's integers on their way to a device: many small arrays, one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]
ALIGNMENT = 4
"""In integers: 16 bytes. Triton compiles a kernel anew where a pointer stops being so aligned."""


class Integers:
    """int32 tensors that are parts of one buffer on a device, so that one copy fills them all.

    They stay where they are, so that a captured CUDA graph may read them again and again.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes = dict(shapes)
        offset, self._offsets = 0, dict[str, int]()
        for name, shape in self._shapes.items():
            self._offsets[name] = offset
            offset += -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        self._use(torch.zeros(offset, dtype=torch.int32, device=device))

    def _use(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._tensors = {
            name: buffer[self._offsets[name] :][: int(np.prod(shape))].view(shape)
            for name, shape in self._shapes.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def load(self, arrays: Mapping[str, IntArray]) -> None:
        """Fills all of them, in the order of the device's other work and without waiting for it.

        Args:
            arrays: one for each name, of its shape.
        """
        # A new one each time: torch hands pinned memory out again only when copies from it have
        # ended, so that the next step's integers never run into the last one's.
        host = torch.empty(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        packed = host.numpy()
        for name, shape in self._shapes.items():
            offset = self._offsets[name]
            packed[offset : offset + int(np.prod(shape))].reshape(shape)[...] = arrays[name]
        self._buffer.copy_(host, non_blocking=True)

    def to(self, device: torch.device) -> Integers:
        """The same integers for another device, in one copy."""
        moved = Integers.__new__(Integers)
        moved._shapes, moved._offsets = self._shapes, self._offsets
        moved._use(self._buffer.to(device))
        return moved
