"""From the tower's width to the language model's. An entry: spec -> module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints.spec import ProjectorSpec, TokenOrder
from models.errors import CheckpointError
from models.registry import Registry

ProjectorFactory: TypeAlias = Callable[[ProjectorSpec], "Projector"]
PROJECTORS: Registry[ProjectorFactory] = Registry("mm_projector_type")
MLP = re.compile(r"mlp(?P<layers>[1-9][0-9]?)x_gelu")


class Projector(nn.Sequential):
    """(tiles, tokens, tower's width) -> (tiles, tokens', language model's width).

    Parameters are named by their position, as in the checkpoints: "0.weight", "2.bias".
    """

    def num_tokens(self, tower_tokens: int) -> int:
        """
        Raises:
            CheckpointError: this projector cannot follow a tower with so many tokens.
        """
        return tower_tokens


def build_projector(spec: ProjectorSpec) -> Projector:
    """
    Raises:
        CheckpointError: the kind is unknown, or does not fit the widths.
    """
    return PROJECTORS["mlpNx_gelu" if MLP.fullmatch(spec.kind) else spec.kind](spec)


def _identity(spec: ProjectorSpec) -> Projector:
    if spec.in_features != spec.out_features:
        raise CheckpointError(
            f"mm_projector_type identity: the tower is {spec.in_features} wide and the language "
            f"model {spec.out_features}; they must be equal"
        )
    return Projector()


def _linear(spec: ProjectorSpec) -> Projector:
    return Projector(nn.Linear(spec.in_features, spec.out_features, bias=spec.bias))


def _mlp(spec: ProjectorSpec) -> Projector:
    depth = MLP.fullmatch(spec.kind)
    if depth is None:
        raise CheckpointError(f"mm_projector_type {spec.kind}: N must be a number from 1 to 99")
    projector = _linear(spec)
    for _ in range(int(depth["layers"]) - 1):
        projector.append(nn.GELU())
        projector.append(nn.Linear(spec.out_features, spec.out_features, bias=spec.bias))
    return projector


class Downsample(nn.Module):
    """Joins k x k neighbours of the grid of tokens along the channels.

    The grid is padded with zeros at the bottom and right to a multiple of k. Within a joined
    token the channels are ordered by (row, column, channel).
    """

    def __init__(self, factor: int, order: TokenOrder) -> None:
        super().__init__()
        self.factor = factor
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        k = self.factor
        side = math.isqrt(x.shape[1])
        grid = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, -side % k, 0, -side % k))
        # tile, row of blocks, row in block, column of blocks, column in block, channel
        blocks = grid.unflatten(2, (-1, k)).unflatten(1, (-1, k)).permute(0, 1, 3, 2, 4, 5)
        if self.order == "column":
            blocks = blocks.transpose(1, 2)
        return blocks.flatten(3).flatten(1, 2)


class DownsamplingProjector(Projector):
    """A projector whose first module is a `Downsample`."""

    def num_tokens(self, tower_tokens: int) -> int:
        side = math.isqrt(tower_tokens)
        if side * side != tower_tokens:
            raise CheckpointError(
                f"a downsampling projector needs a square grid of tokens, and the tower has "
                f"{tower_tokens} (mm_vision_select_feature: patch leaves the class token out)"
            )
        downsample = self[0]
        assert isinstance(downsample, Downsample)
        return math.ceil(side / downsample.factor) ** 2


def _mlp_downsample(spec: ProjectorSpec) -> Projector:
    wide = 4 * spec.in_features
    return DownsamplingProjector(
        Downsample(2, spec.token_order),
        nn.LayerNorm(wide),
        nn.Linear(wide, spec.out_features),
        nn.GELU(),
        nn.Linear(spec.out_features, spec.out_features),
    )


def _mlp_downsample_3x3(spec: ProjectorSpec) -> Projector:
    wide, narrow = 9 * spec.in_features, 3 * spec.in_features
    return DownsamplingProjector(
        Downsample(3, spec.token_order),
        nn.LayerNorm(wide),
        nn.Linear(wide, narrow),
        nn.GELU(),
        nn.LayerNorm(narrow),
        nn.Linear(narrow, spec.out_features),
        nn.GELU(),
        nn.Linear(spec.out_features, spec.out_features),
    )


PROJECTORS.register("identity", _identity)
PROJECTORS.register("linear", _linear)
PROJECTORS.register("mlpNx_gelu", _mlp)
PROJECTORS.register("mlp_downsample", _mlp_downsample)
PROJECTORS.register("mlp_downsample_2x2_fix", _mlp_downsample)
PROJECTORS.register("mlp_downsample_3x3_fix", _mlp_downsample_3x3)
