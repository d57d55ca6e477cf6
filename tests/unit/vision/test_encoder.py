"""Towers are transformers' hidden states, projectors are their formulas in plain indexing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from models.checkpoints import PreprocessingSpec, ProjectorSpec, VisionSpec, open_checkpoint
from models.errors import CheckpointError
from models.vision import ImagePreprocessor, PreparedImage, VisionEncoder, load_vision
from models.vision.projectors import Downsample, build_projector
from models.vision.tower import VisionTower
from tests.synthetic import (
    TOWER_HIDDEN,
    clip_config,
    read_tensors,
    rewrite_json,
    siglip_config,
    vila_projector,
    write_tiny_llava,
    write_tiny_vila,
)  # fmt: skip

CPU = torch.device("cpu")
NO_PREPROCESSING = PreprocessingSpec("default", "square", 32, 32, (0.5,) * 3, (0.5,) * 3)


# ---- towers ---------------------------------------------------------------------------------


def tower_pair(kind: str, layer: int, feature: str) -> tuple[nn.Module, VisionTower]:
    torch.manual_seed(0)
    config: Any = clip_config() if kind == "clip" else siglip_config()
    whole: nn.Module = (CLIPVisionModel if kind == "clip" else SiglipVisionModel)(config).eval()
    tower = VisionTower(VisionSpec(config, layer, feature, NO_PREPROCESSING)).eval()
    values = {
        name.removeprefix("vision_model."): value for name, value in whole.state_dict().items()
    }
    own = {name for name, _ in tower.named_parameters()}
    tower.load_state_dict({name: values[name] for name in own}, strict=False)
    assert {name for name in values if not name.endswith("position_ids")} == own | set(tower.unused)
    return whole, tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_a_tower_is_the_selected_hidden_state_of_transformers(
    kind: str, layer: int, feature: str
) -> None:
    whole, tower = tower_pair(kind, layer, feature)
    size = 32 if kind == "clip" else 28
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = whole(pixels, output_hidden_states=True).hidden_states[layer]
        got = tower(pixels)
    if kind == "clip" and feature == "patch":
        expected = expected[:, 1:]
    assert torch.allclose(got, expected, atol=1e-5)
    assert got.shape[1] == tower.num_tokens


def test_layers_behind_the_selected_one_are_not_built() -> None:
    _, tower = tower_pair("siglip", -2, "cls_patch")
    built = {name.split(".")[2] for name, _ in tower.encoder.named_parameters(prefix="encoder")}
    assert built == {"0", "1"}
    assert any(name.startswith("encoder.layers.2.") for name in tower.unused)
    assert any(name.startswith("head.") for name in tower.unused)
    assert "post_layernorm.weight" in tower.unused


# ---- projectors -----------------------------------------------------------------------------


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
def test_downsampling_joins_neighbours_in_its_order(
    side: int, factor: int, order: Literal["row", "column"]
) -> None:
    x = torch.randn(2, side * side, 5)
    got = Downsample(factor, order)(x)
    assert torch.equal(got, torch.stack([downsampled(tile, factor, order) for tile in x]))


def test_the_two_orders_differ() -> None:
    x = torch.randn(1, 49, 5)
    row, column = Downsample(2, "row")(x), Downsample(2, "column")(x)
    assert not torch.equal(row, column)
    assert torch.equal(row[0].view(4, 4, -1).transpose(0, 1), column[0].view(4, 4, -1))


def gelu(x: Tensor) -> Tensor:
    """The exact one; the tanh approximation is off by up to 5e-4."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def random_projector(kind: str, order: Literal["row", "column"] = "row") -> nn.Module:
    torch.manual_seed(0)
    projector = build_projector(ProjectorSpec(kind, TOWER_HIDDEN, 24, order))
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projector.eval()


@torch.inference_mode()
def test_projectors_are_their_formulas() -> None:
    x = torch.randn(2, 16, TOWER_HIDDEN)
    p = dict(random_projector("linear").named_parameters())
    assert set(p) == {"0.weight", "0.bias"}
    assert torch.allclose(
        random_projector("linear")(x), x @ p["0.weight"].T + p["0.bias"], atol=1e-4
    )
    p = dict(random_projector("mlp2x_gelu").named_parameters())
    assert set(p) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    hidden = gelu(x @ p["0.weight"].T + p["0.bias"])
    expected = hidden @ p["2.weight"].T + p["2.bias"]
    assert torch.allclose(random_projector("mlp2x_gelu")(x), expected, atol=1e-4)


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("side", [6, 7])
@torch.inference_mode()
def test_mlp_downsample_is_its_formula(order: Literal["row", "column"], side: int) -> None:
    x = torch.randn(2, side * side, TOWER_HIDDEN)
    projector = random_projector("mlp_downsample", order)
    p = dict(projector.named_parameters())
    assert set(p) == {f"{i}.{part}" for i in (1, 2, 4) for part in ("weight", "bias")}
    wide = torch.stack([downsampled(tile, 2, order) for tile in x])
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * p["1.weight"] + p["1.bias"]
    expected = gelu(normed @ p["2.weight"].T + p["2.bias"]) @ p["4.weight"].T + p["4.bias"]
    assert torch.allclose(projector(x), expected, atol=1e-3)


def test_the_numbers_of_tokens_of_released_models() -> None:
    """reference/checkpoints.md: CLIP 336 -> 576; SigLIP 384 and 448 with DS2 -> 196 and 256."""
    linear = build_projector(ProjectorSpec("linear", 8, 8))
    down = build_projector(ProjectorSpec("mlp_downsample", 8, 8))
    assert linear.num_tokens(576) == 576
    assert down.num_tokens(27 * 27) == 196
    assert down.num_tokens(32 * 32) == 256
    with pytest.raises(CheckpointError, match="square grid of tokens, and the tower has 577"):
        down.num_tokens(577)


# ---- both, loaded ---------------------------------------------------------------------------


def tiles(pixel_values: Tensor) -> PreparedImage:
    """A prepared picture of so many tiles, 16 tokens each."""
    return PreparedImage(pixel_values, 16 * len(pixel_values), b"")


def load(folder: Path) -> VisionEncoder:
    return load_vision(open_checkpoint(folder, precision="W16A16"), CPU, torch.float32)


def test_every_picture_gets_its_own_embeddings_back(tmp_path: Path) -> None:
    encoder = load(write_tiny_llava(tmp_path / "tiny"))
    pixels = torch.randn(40, 3, 32, 32)
    counts = [1, 3, 16, 2, 17, 1]  # one of them more tiles than go through the tower at once
    pictures: list[PreparedImage] = []
    for count in counts:
        start = sum(len(p.pixel_values) for p in pictures)
        pictures.append(tiles(pixels[start : start + count]))
    got = encoder(pictures)
    assert [len(x) for x in got] == [16 * count for count in counts]
    for picture, embeddings in zip(pictures, got, strict=True):
        (alone,) = encoder([picture])
        assert torch.allclose(alone, embeddings, atol=1e-5)
    assert encoder([]) == []


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("tower_inside", [True, False])
def test_llavas_encoder_is_transformers_tower_and_the_formula(
    projector: str, tower_inside: bool, tmp_path: Path
) -> None:
    folder = write_tiny_llava(tmp_path / "tiny", projector=projector, tower_inside=tower_inside)
    tensors = read_tensors(folder / "model.safetensors")
    if not tower_inside:
        prefix = "model.vision_tower.vision_tower."
        stored = read_tensors(folder / "clip-tiny/model.safetensors")
        tensors |= {f"{prefix}{name}": value for name, value in stored.items()}
    tower = reference_tower(CLIPVisionModel(clip_config()), tensors)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    p = {n.removeprefix("model.mm_projector."): t.float() for n, t in tensors.items()}
    if projector == "linear":
        expected = hidden @ p["weight"].T + p["bias"]
    else:
        expected = gelu(hidden @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    got = load(folder)([tiles(pixels[:1]), tiles(pixels[1:])])
    assert torch.allclose(torch.stack(got), expected, atol=1e-4)


def reference_tower(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """transformers' tower with a checkpoint's tensors, whatever prefixes both have."""
    values = {name.rpartition("vision_model.")[2]: t.float() for name, t in tensors.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name.removeprefix("vision_model.")])
    return model.eval()


def test_the_order_of_tokens_follows_the_checkpoints_era(tmp_path: Path) -> None:
    folder = write_tiny_vila(tmp_path / "tiny", awq=False)
    picture = tiles(torch.randn(1, 3, 28, 28))
    (column,) = load(folder)([picture])
    rewrite_json(folder / "config.json", min_tiles=1)
    (row,) = load(folder)([picture])
    assert torch.allclose(row.view(4, 4, -1).transpose(0, 1), column.view(4, 4, -1), atol=1e-5)
    assert not torch.allclose(row, column, atol=1e-2)


def test_preprocessing_and_tower_fit_together(tmp_path: Path) -> None:
    for folder in (write_tiny_llava(tmp_path / "llava"), write_tiny_vila(tmp_path / "vila")):
        checkpoint = open_checkpoint(folder, precision="W16A16")
        encoder = load_vision(checkpoint, CPU, torch.bfloat16)
        preprocess = ImagePreprocessor(
            checkpoint.spec.vision.preprocessing, encoder.num_tokens_per_tile
        )
        prepared = preprocess(Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50))
        (embeddings,) = encoder([prepared])
        assert embeddings.shape == (prepared.num_tokens, 256) == (16, 256)
        assert embeddings.dtype == torch.bfloat16 and embeddings.isfinite().all()
        encoder.profile(num_images=3)


def test_projectors_of_released_shapes_are_known_by_their_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    names = {name.removeprefix("layers.") for name in vila_projector(24, generator, torch.float16)}
    spec = ProjectorSpec("mlp_downsample", TOWER_HIDDEN, 24)
    assert {name for name, _ in build_projector(spec).named_parameters()} == names
    assert build_projector(replace(spec, token_order="column"))[0].order == "column"
