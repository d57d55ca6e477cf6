"""On which device each part of a model lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """
    Attributes:
        vision: tower and projector.
        embedding: of tokens; a step's tensors are made here.
        layers: of the decoder, each with its KV cache.
        norm: behind the last layer.
        head: logits are made and sampled here.
    """

    vision: torch.device
    embedding: torch.device
    layers: tuple[torch.device, ...]
    norm: torch.device
    head: torch.device

    @classmethod
    def single(cls, device: torch.device, num_layers: int) -> Placement:
        return cls(device, device, (device,) * num_layers, device, device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each once, in the order in which a step comes by."""
        parts = (self.vision, self.embedding, *self.layers, self.norm, self.head)
        return tuple(dict.fromkeys(parts))

    def of(self, name: str) -> torch.device:
        """Of a tensor or module of the decoder, by its name there."""
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            return self.layers[int(parts[2])]
        if parts[:2] == ["model", "embed_tokens"]:
            return self.embedding
        return self.head if parts[0] == "lm_head" else self.norm
