"""The ways to compute attention: each lays a step out for itself, and computes with its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.errors import ConfigurationError
from models.gpu.support import runs_triton
from models.language.attention import AttentionBatch, Span
from models.language.kv_cache import KVCache, KVCacheShape
from models.language.paged_batch import PagedBatch
from models.registry import Registry


class StepLayout(Protocol):
    """Where a step's packed tokens lie, and attention over them."""

    @property
    def positions(self) -> Tensor:
        """(tokens,) int32 or int64: each token's, in its sequence."""

    @classmethod
    def build(cls, spans: Sequence[Span], shape: KVCacheShape, device: torch.device) -> StepLayout:
        """From the step's chunks, those of one token first."""

    def to(self, device: torch.device) -> StepLayout:
        """The same layout, for layers on another device."""

    def attend(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int
    ) -> Tensor:
        """Rotates queries and keys, writes keys and values to the cache, and attends.

        Args:
            qkv: (tokens, heads + 2 * kv_heads, head_dim), contiguous; may be overwritten.
            rotation: see `RotaryEmbedding.at`.

        Returns:
            (tokens, heads, head_dim).
        """


ATTENTION_BACKENDS: Registry[type[StepLayout]] = Registry("attention backend", ConfigurationError)
ATTENTION_BACKENDS.register("torch", AttentionBatch)
ATTENTION_BACKENDS.register("triton", PagedBatch)


def select_attention(device: torch.device, name: str = "auto") -> str:
    """A name of `ATTENTION_BACKENDS`.

    Args:
        name: of `ATTENTION_BACKENDS`; auto: our Triton kernels where they run, torch elsewhere.

    Raises:
        ConfigurationError: it does not run on this device.
    """
    if name == "auto":
        name = "triton" if runs_triton(device) else "torch"
    if name == "triton" and not runs_triton(device):
        raise ConfigurationError(
            f"attention backend 'triton' does not run on {device}: it needs the package triton and "
            "an NVIDIA GPU of compute capability 8.0 or later; use auto or torch"
        )
    return name
