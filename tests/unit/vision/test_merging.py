"""Tiles are joined as by transformers' LLaVA-NeXT, in tensors and in the whole encoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlavaNextConfig, LlavaNextModel

from models.checkpoints import PreprocessingSpec, ProjectorSpec, VisionSpec, WeightSource
from models.checkpoints.spec import Checkpoint, PatchMerge
from models.checkpoints.tensor_files import TensorStore, open_tensor_file
from models.engine.image_cache import ImageEmbeddingCache
from models.errors import CheckpointError
from models.vision import ImagePreprocessor, PreparedImage, VisionEncoder, load_vision
from models.vision.anyres import TileGrid
from models.vision.merging import merge_tiles
from tests.tiny import clip_config
from tests.unit.vision.test_anyres import MEAN, STD, noise

CPU = torch.device("cpu")
HIDDEN = 48
PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
PREPROCESSING = PreprocessingSpec(
    "anyres", "shortest_edge", 32, 32, MEAN, STD, grid_pinpoints=PINPOINTS
)
SIZES = [(64, 64), (300, 100), (100, 300), (5, 3), (400, 3), (3, 400), (640, 480), (96, 32)]


def next_config() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=clip_config(),
        text_config=LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=40,
        ),
        image_token_index=39,
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
    )  # fmt: skip


# ---- tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_spatial_unpad_is_transformers_packing(size: tuple[int, int]) -> None:
    prepared = ImagePreprocessor(PREPROCESSING, 16, "spatial_unpad")(noise(*size))
    features = torch.randn(len(prepared.pixel_values), 16, HIDDEN)
    newline = torch.randn(HIDDEN)
    packer: Any = SimpleNamespace(config=next_config())
    (expected,), _ = LlavaNextModel.pack_image_features(
        packer, [features], [(size[1], size[0])], "default", newline
    )
    got = merge_tiles(features, prepared.grid, "spatial_unpad", newline)
    assert torch.equal(got, expected)
    assert len(got) == prepared.num_tokens


def test_spatial_is_one_plane_of_all_tiles() -> None:
    """Token (row, column) of the plane, looked up in its tile by itself."""
    features, grid = torch.randn(7, 9, 5), TileGrid(rows=2, columns=3)
    expected = [
        features[1 + 3 * (row // 3) + column // 3, 3 * (row % 3) + column % 3]
        for row in range(6)
        for column in range(9)
    ]
    got = merge_tiles(features, grid, "spatial", None)
    assert torch.equal(got, torch.stack([*features[0], *expected]))


@pytest.mark.parametrize("grid", [None, TileGrid(2, 1)])
def test_flat_is_one_tile_after_the_other(grid: TileGrid | None) -> None:
    features = torch.randn(3, 4, 5)
    assert torch.equal(merge_tiles(features, grid, "flat", None), torch.cat([*features]))


def test_a_picture_that_is_not_cut_has_no_newline() -> None:
    """As in LLaVA, where pictures of `pad` go by another path than those in tiles."""
    features = torch.randn(1, 4, 5)
    assert torch.equal(merge_tiles(features, None, "spatial_unpad", torch.ones(5)), features[0])


# ---- the encoder ----------------------------------------------------------------------------


def reference_model() -> LlavaNextModel:
    torch.manual_seed(0)
    model = LlavaNextModel(next_config()).eval()
    with torch.no_grad():
        for parameter in model.multi_modal_projector.parameters():
            parameter.normal_(std=0.2)
        model.image_newline.normal_()
    return model


def projector_tensors(model: LlavaNextModel) -> dict[str, Tensor]:
    projector = model.multi_modal_projector
    return {
        "0.weight": projector.linear_1.weight, "0.bias": projector.linear_1.bias,
        "2.weight": projector.linear_2.weight, "2.bias": projector.linear_2.bias,
        "image_newline": model.image_newline,
    }  # fmt: skip


def load(
    folder: Path,
    model: LlavaNextModel,
    merge: PatchMerge = "spatial_unpad",
    projector: dict[str, Tensor] | None = None,
    order: Literal["row", "column"] = "row",
    feature: str = "patch",
) -> VisionEncoder:
    def source(component: str, tensors: dict[str, Tensor]) -> WeightSource:
        path = folder / f"{component}.safetensors"
        save_file({name: value.detach().clone() for name, value in tensors.items()}, path)
        store = TensorStore.of(path.name, [open_tensor_file(path, path.name)])
        return WeightSource.select(component, store, {name: name for name in tensors})

    tower = {
        name.removeprefix("vision_model."): value
        for name, value in model.vision_tower.state_dict().items()
    }
    spec: Any = SimpleNamespace(
        vision=VisionSpec(clip_config(), -2, feature, PREPROCESSING),
        projector=ProjectorSpec("mlp2x_gelu", 64, HIDDEN, token_order=order, merge=merge),
    )
    language: Any = None
    checkpoint = Checkpoint(
        spec, language, source("projector", projector or projector_tensors(model)),
        source("vision tower", tower),
    )  # fmt: skip
    return load_vision(checkpoint, CPU, torch.float32)


def prepared(*sizes: tuple[int, int], merge: PatchMerge = "spatial_unpad") -> list[PreparedImage]:
    return [ImagePreprocessor(PREPROCESSING, 16, merge)(noise(*size)) for size in sizes]


def test_the_encoder_is_transformers_llava_next(tmp_path: Path) -> None:
    """Pictures of every shape in one batch: tower, projector, unpadding and newlines."""
    model = reference_model()
    images = prepared(*SIZES)
    with torch.inference_mode():
        expected = [
            model.get_image_features(
                image.pixel_values[None], torch.tensor([[size[1], size[0]]])
            ).pooler_output[0]
            for size, image in zip(SIZES, images, strict=True)
        ]
    got = load(tmp_path, model)(images)
    for picture, reference, image in zip(got, expected, images, strict=True):
        assert picture.shape == (image.num_tokens, HIDDEN)
        assert torch.allclose(picture, reference, atol=1e-5)


@pytest.mark.parametrize("merge", ["spatial_unpad", "flat"])
def test_company_changes_nothing(merge: PatchMerge, tmp_path: Path) -> None:
    model = reference_model()
    tensors = projector_tensors(model)
    if merge == "flat":
        del tensors["image_newline"]
    encoder = load(tmp_path, model, merge, tensors)
    images = prepared(*SIZES, *SIZES, merge=merge)
    assert sum(len(image.pixel_values) for image in images) > 3 * 16  # several runs of the tower
    together = encoder(images)
    for image, embeddings in zip(images, together, strict=True):
        (alone,) = encoder([image])
        assert alone.shape == (image.num_tokens, HIDDEN)
        assert torch.allclose(alone, embeddings, atol=1e-5)


def test_the_tower_never_sees_more_tiles_at_once_than_its_bound(tmp_path: Path) -> None:
    encoder = load(tmp_path, reference_model())
    batches: list[int] = []
    encoder.tower.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    encoder(prepared(*SIZES, *SIZES))
    encoder.profile(num_images=9)
    assert max(batches) == 16


def test_profiling_takes_the_pictures_with_the_most_tiles(tmp_path: Path) -> None:
    encoder = load(tmp_path, reference_model())
    tiles: list[int] = []
    encoder.tower.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    encoder.profile(num_images=3)
    assert sum(tiles) == 3 * (1 + 4)


def test_repeated_pictures_are_encoded_once_and_others_of_the_same_pixels_are_not(
    tmp_path: Path,
) -> None:
    """Black pictures of two shapes are the same tiles; one of them has fewer rows that show it."""
    encoder = load(tmp_path, reference_model())
    preprocess = ImagePreprocessor(PREPROCESSING, 16, "spatial_unpad")
    wide, thin = (preprocess(Image.new("RGB", size)) for size in ((96, 32), (96, 16)))
    assert torch.equal(wide.pixel_values, thin.pixel_values)
    cache = ImageEmbeddingCache(encoder, capacity_bytes=1 << 20)
    found = cache.embed([wide, thin, wide])
    assert cache.num_encoded == 2
    assert len(found[wide.digest]) == wide.num_tokens == 16 + 4 * 13
    assert len(found[thin.digest]) == thin.num_tokens == 16 + 2 * 13
    assert torch.equal(cache.embed([thin])[thin.digest], found[thin.digest])
    assert cache.num_encoded == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_newline": None}, "image_newline is missing"),
        ({"image_newline": torch.ones(HIDDEN + 1)}, "image_newline"),
        ({"image_newline": torch.ones(1, HIDDEN)}, "image_newline"),
        ({"0.bias": None}, "0.bias is missing"),
    ],
)
def test_a_projector_with_a_wrong_newline_is_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    model = reference_model()
    tensors = {**projector_tensors(model), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, model, projector=kept)


def test_a_newline_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="image_newline"):
        load(tmp_path, reference_model(), merge="flat")


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_tokens_that_are_no_plane_are_refused(merge: PatchMerge, tmp_path: Path) -> None:
    model = reference_model()
    with pytest.raises(CheckpointError, match=f"{merge} needs a square grid .* a tile has 17"):
        load(tmp_path, model, merge, feature="cls_patch")
    with pytest.raises(CheckpointError, match=f"{merge} needs tokens row by row, and .* column"):
        load(tmp_path, model, merge, order="column")
