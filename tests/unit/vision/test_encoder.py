"""Towers are transformers' hidden states, projectors are their formulas in plain indexing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from models.checkpoints import PreprocessingSpec, VisionSpec, open_checkpoint
from models.vision import ImagePreprocessor, PreparedImage, VisionEncoder, load_vision
from models.vision.tower import VisionTower
from tests.checkpoint_files import read_tensors, rewrite_json
from tests.tiny import clip_config, siglip_config, write_tiny_llava, write_tiny_vila

CPU = torch.device("cpu")
NO_PREPROCESSING = PreprocessingSpec("default", "square", 32, 32, (0.5,) * 3, (0.5,) * 3)


# ---- towers ---------------------------------------------------------------------------------


def tower_pair(
    kind: str, layer: int, feature: str, **changes: int
) -> tuple[nn.Module, VisionTower]:
    torch.manual_seed(0)
    config: Any = clip_config() if kind == "clip" else siglip_config()
    for key, value in changes.items():
        setattr(config, key, value)
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


@pytest.mark.parametrize(
    ("kind", "size", "tokens"),
    [("clip", 224, 256), ("clip", 336, 576), ("siglip", 384, 729), ("siglip", 448, 1024)],
)
def test_towers_at_the_released_resolutions(kind: str, size: int, tokens: int) -> None:
    whole, tower = tower_pair(kind, -2, "patch", image_size=size, patch_size=14)
    assert tower.num_tokens == tokens
    assert tower.get_parameter("embeddings.position_embedding.weight").shape[0] == (
        tokens + (kind == "clip")
    )
    pixels = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected = whole(pixels, output_hidden_states=True).hidden_states[-2]
        got = tower(pixels)
    assert torch.allclose(got, expected[:, -tokens:], atol=1e-5)


def test_layers_behind_the_selected_one_are_not_built() -> None:
    _, tower = tower_pair("siglip", -2, "cls_patch")
    built = {name.split(".")[2] for name, _ in tower.encoder.named_parameters(prefix="encoder")}
    assert built == {"0", "1"}
    assert any(name.startswith("encoder.layers.2.") for name in tower.unused)
    assert any(name.startswith("head.") for name in tower.unused)
    assert "post_layernorm.weight" in tower.unused


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


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


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
