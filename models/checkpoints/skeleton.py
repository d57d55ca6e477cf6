"""A checkpoint's modules without data: their tensors are on `meta`, of the right shapes and dtypes.

Made by the loaders themselves, which check everything that they check when they really load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.awq import QuantizedWeight
from models.checkpoints.spec import Checkpoint
from models.checkpoints.weight_source import WeightSource
from models.language.decoder import Decoder
from models.language.loading import linear_shapes, load_decoder
from models.vision import VisionEncoder, load_vision

META = torch.device("meta")


def vision_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> VisionEncoder:
    """
    Raises:
        CheckpointError: see `load_vision`.
    """
    bare = Checkpoint(
        checkpoint.spec,
        checkpoint.language,
        _WithoutData(checkpoint.projector),
        _WithoutData(checkpoint.vision),
    )
    return load_vision(bare, META, dtype)


def decoder_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Decoder:
    """4-bit layers are the reference backend's, whose size is the others' within a percent.

    Raises:
        CheckpointError: see `load_decoder`.
    """
    source, config = checkpoint.language, checkpoint.spec.language
    return load_decoder(
        _WithoutData(source, linear_shapes(config), group_size(source) or 1),
        config,
        max_positions=1,
        device=META,
        dtype=dtype,
        backend="reference",
    )


def group_size(source: WeightSource) -> int | None:
    """Of its 4-bit layers. One of them is really read: no format's header says it plainly."""
    quantized = source.quantized_linears()
    return source.quantized(quantized[0]).group_size if quantized else None


class _WithoutData(WeightSource):
    """The same tensors, of which loaders see shapes and dtypes only."""

    def __init__(
        self,
        source: WeightSource,
        linears: dict[str, tuple[int, int]] | None = None,
        group_size: int = 1,
    ) -> None:
        """
        Args:
            linears: (N, K) of the layers that may be there in 4 bits.
        """
        super().__init__(
            source.component,
            source._places,
            source.where,
            source._absent,
            source._spellings,
            source._stored_names,
        )
        self._linears = linears or {}
        self._group_size = group_size

    def get(self, name: str) -> Tensor:
        header = self._place(name).header
        return torch.empty(header.shape, dtype=header.dtype, device=META)

    def copy_into(self, name: str, out: Tensor) -> None:
        """There is nothing to copy."""

    def quantized(self, linear: str) -> QuantizedWeight:
        n, k = self._linears[linear]
        groups = (n, k // self._group_size)
        return QuantizedWeight(
            torch.empty((n, k), dtype=torch.uint8, device=META),
            torch.empty(groups, dtype=torch.float16, device=META),
            torch.empty(groups, dtype=torch.uint8, device=META),
            self._group_size,
        )
