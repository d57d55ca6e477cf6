"""Projectors are their formulas, in plain indexing and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from models.checkpoints import ProjectorSpec
from models.errors import CheckpointError
from models.vision.projectors import Downsample, Projector, build_projector
from tests.tiny import TOWER_HIDDEN, clip_config

OUT = 24
Order = Literal["row", "column"]


def random_projector(kind: str, order: Order = "row", bias: bool = True) -> Projector:
    torch.manual_seed(0)
    projector = build_projector(ProjectorSpec(kind, TOWER_HIDDEN, OUT, order, bias=bias))
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projector.eval()


def parameters(projector: nn.Module) -> dict[str, Tensor]:
    return dict(projector.named_parameters())


def gelu(x: Tensor) -> Tensor:
    """The exact one; the tanh approximation is off by up to 5e-4."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, p: Mapping[str, Tensor], index: int) -> Tensor:
    return x @ p[f"{index}.weight"].T + p[f"{index}.bias"]


def layer_norm(x: Tensor, p: Mapping[str, Tensor], index: int) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * p[f"{index}.weight"] + p[f"{index}.bias"]


# ---- downsampling ---------------------------------------------------------------------------


def downsampled(x: Tensor, k: int, order: str) -> Tensor:
    """VILA's downsampling block, cell by cell: (tokens, C) -> (cells, k * k * C)."""
    side, channels = math.isqrt(x.shape[0]), x.shape[1]
    cells = -(-side // k)

    def patch(row: int, column: int) -> Tensor:
        if row >= side or column >= side:
            return torch.zeros(channels)
        return x[row * side + column]

    def cell(a: int, b: int) -> Tensor:
        return torch.cat([patch(a * k + i, b * k + j) for i in range(k) for j in range(k)])

    if order == "row":
        return torch.stack([cell(a, b) for a in range(cells) for b in range(cells)])
    return torch.stack([cell(a, b) for b in range(cells) for a in range(cells)])


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("order", ["row", "column"])
def test_downsampling_joins_neighbours_in_its_order(side: int, factor: int, order: Order) -> None:
    x = torch.randn(2, side * side, 5)
    got = Downsample(factor, order)(x)
    assert torch.equal(got, torch.stack([downsampled(tile, factor, order) for tile in x]))


def test_the_two_orders_differ() -> None:
    x = torch.randn(1, 49, 5)
    row, column = Downsample(2, "row")(x), Downsample(2, "column")(x)
    assert not torch.equal(row, column)
    assert torch.equal(row[0].view(4, 4, -1).transpose(0, 1), column[0].view(4, 4, -1))


# ---- formulas -------------------------------------------------------------------------------


@torch.inference_mode()
def test_linear_is_its_formula() -> None:
    x = torch.randn(2, 16, TOWER_HIDDEN)
    projector = random_projector("linear")
    p = parameters(projector)
    assert set(p) == {"0.weight", "0.bias"}
    assert torch.allclose(projector(x), linear(x, p, 0), atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@torch.inference_mode()
def test_an_mlp_has_as_many_layers_as_its_name_says(depth: int) -> None:
    x = torch.randn(2, 16, TOWER_HIDDEN)
    projector = random_projector(f"mlp{depth}x_gelu")
    p = parameters(projector)
    indices = range(0, 2 * depth, 2)
    assert set(p) == {f"{i}.{part}" for i in indices for part in ("weight", "bias")}
    expected = linear(x, p, 0)
    for index in indices[1:]:
        expected = linear(gelu(expected), p, index)
    assert torch.allclose(projector(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_mlp2x_gelu_is_transformers_projector(bias: bool) -> None:
    """llava-hf's linear_1 and linear_2 are 0 and 2 here; `multimodal_projector_bias` is `bias`."""
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=LlamaConfig(hidden_size=OUT, num_hidden_layers=1, num_attention_heads=2),
        multimodal_projector_bias=bias,
    )
    projector = random_projector("mlp2x_gelu", bias=bias)
    reference = LlavaMultiModalProjector(config).eval()
    names = {"0": "linear_1", "2": "linear_2"}
    reference.load_state_dict({
        f"{names[name[0]]}{name[1:]}": value for name, value in projector.state_dict().items()
    })  # fmt: skip
    x = torch.randn(2, 16, TOWER_HIDDEN)
    assert torch.allclose(projector(x), reference(x), atol=1e-4)


@torch.inference_mode()
def test_identity_is_nothing_between_equal_widths() -> None:
    projector = build_projector(ProjectorSpec("identity", 8, 8))
    x = torch.randn(2, 4, 8)
    assert torch.equal(projector(x), x) and not parameters(projector)
    assert projector.num_tokens(4) == 4
    with pytest.raises(CheckpointError, match="identity: the tower is 8 wide and .* model 24"):
        build_projector(ProjectorSpec("identity", 8, 24))


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_2x2_fix"])
@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("side", [6, 7])
@torch.inference_mode()
def test_downsampling_by_two_is_its_formula(kind: str, order: Order, side: int) -> None:
    x = torch.randn(2, side * side, TOWER_HIDDEN)
    projector = random_projector(kind, order)
    p = parameters(projector)
    assert set(p) == {f"{i}.{part}" for i in (1, 2, 4) for part in ("weight", "bias")}
    wide = torch.stack([downsampled(tile, 2, order) for tile in x])
    expected = linear(gelu(linear(layer_norm(wide, p, 1), p, 2)), p, 4)
    got = projector(x)
    assert torch.allclose(got, expected, atol=1e-3)
    assert got.shape[1] == projector.num_tokens(side * side)


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("side", [6, 7, 8])
@torch.inference_mode()
def test_downsampling_by_three_is_its_formula(order: Order, side: int) -> None:
    x = torch.randn(2, side * side, TOWER_HIDDEN)
    projector = random_projector("mlp_downsample_3x3_fix", order)
    p = parameters(projector)
    assert set(p) == {f"{i}.{part}" for i in (1, 2, 4, 5, 7) for part in ("weight", "bias")}
    assert p["2.weight"].shape == (3 * TOWER_HIDDEN, 9 * TOWER_HIDDEN)
    wide = torch.stack([downsampled(tile, 3, order) for tile in x])
    narrow = gelu(linear(layer_norm(wide, p, 1), p, 2))
    expected = linear(gelu(linear(layer_norm(narrow, p, 4), p, 5)), p, 7)
    got = projector(x)
    assert torch.allclose(got, expected, atol=1e-3)
    assert got.shape[1] == projector.num_tokens(side * side)


# ---- kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tower_tokens", "tokens"),
    [
        ("linear", 576, 576),
        ("mlp2x_gelu", 576, 576),
        ("mlp_downsample", 27 * 27, 196),
        ("mlp_downsample", 32 * 32, 256),
        ("mlp_downsample_2x2_fix", 32 * 32, 256),
        ("mlp_downsample_3x3_fix", 27 * 27, 81),
        ("mlp_downsample_3x3_fix", 32 * 32, 121),
    ],
)
def test_the_numbers_of_tokens_of_released_models(
    kind: str, tower_tokens: int, tokens: int
) -> None:
    """CLIP 336 has 576; SigLIP 384 and 448 have 729 and 1024."""
    assert build_projector(ProjectorSpec(kind, 8, 8)).num_tokens(tower_tokens) == tokens


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_3x3_fix"])
def test_a_class_token_cannot_be_downsampled(kind: str) -> None:
    projector = build_projector(ProjectorSpec(kind, 8, 8))
    with pytest.raises(CheckpointError, match="square grid of tokens, and the tower has 577"):
        projector.num_tokens(577)


@pytest.mark.parametrize("kind", ["resampler", "mlp0x_gelu", "mlp_gelu", "mlp100x_gelu", ""])
def test_an_unknown_kind_is_answered_with_the_known(kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_projector(ProjectorSpec(kind, 8, 8))
    assert str(caught.value) == (
        f"unknown mm_projector_type {kind!r}; known: identity, linear, mlpNx_gelu, "
        "mlp_downsample, mlp_downsample_2x2_fix, mlp_downsample_3x3_fix"
    )


def test_the_patterns_own_name_is_no_kind() -> None:
    with pytest.raises(CheckpointError, match="mlpNx_gelu: N must be a number from 1 to 99"):
        build_projector(ProjectorSpec("mlpNx_gelu", 8, 8))


def test_projectors_of_released_shapes_are_known_by_their_tensors() -> None:
    """As VILA-1.5 has them: the downsampling, and GELU, have none."""
    names = {f"{index}.{kind}" for index in (1, 2, 4) for kind in ("weight", "bias")}
    spec = ProjectorSpec("mlp_downsample", TOWER_HIDDEN, OUT)
    assert set(parameters(build_projector(spec))) == names
    assert build_projector(replace(spec, token_order="column"))[0].order == "column"
