"""What a checkpoint says about its model, in our words. Plain values; no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from models.checkpoints.weight_source import WeightSource

Precision: TypeAlias = Literal["W4A16", "W16A16"]
TokenOrder: TypeAlias = Literal["row", "column"]
PatchMerge: TypeAlias = Literal["flat", "spatial", "spatial_unpad"]
Tokenization: TypeAlias = Literal["pieces", "whole"]


@dataclass(frozen=True)
class PreprocessingSpec:
    """How a picture becomes pixels.

    Attributes:
        mode: "pad" (to a square, then as below), "resize" (straight to the final square),
            "anyres" (the whole picture, and tiles of it at a higher resolution), or "default"
            (as below).
        resize: "shortest_edge" (keeps the aspect ratio, then crops the centre) or "square".
        size: pixels that `resize` aims at.
        crop_size: pixels of the final square's side.
        mean, std: per channel, for pixels scaled to 0..1.
        resample: PIL's number of the filter; 3 is bicubic.
        rescale_factor: from bytes to 0..1.
        grid_pinpoints: (width, height) in pixels, of the resolutions that "anyres" chooses from.
    """

    mode: str
    resize: Literal["shortest_edge", "square"]
    size: int
    crop_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale_factor: float = 1 / 255
    grid_pinpoints: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class VisionSpec:
    """The tower.

    Attributes:
        select_layer: index into the hidden states, of which 0 is the embeddings; -2 leaves out
            the last layer.
        select_feature: "patch" (without CLIP's class token) or "cls_patch" (all).
    """

    config: CLIPVisionConfig | SiglipVisionConfig
    select_layer: int
    select_feature: str
    preprocessing: PreprocessingSpec


@dataclass(frozen=True)
class ProjectorSpec:
    """Between tower and language model.

    Attributes:
        kind: a name in `models.vision.projectors`.
        in_features: the tower's width.
        out_features: the language model's width.
        token_order: in which a downsampling projector emits its grid. VILA-1.5 was trained
            column by column, NVILA row by row.
        merge: how the tiles of an "anyres" picture are joined: "flat" (one after the other),
            "spatial" (as one grid), "spatial_unpad" (the same, without the padding, and with the
            tensor `image_newline` behind each row).
        bias: whether an "mlp" or "linear" has biases.
    """

    kind: str
    in_features: int
    out_features: int
    token_order: TokenOrder = "row"
    merge: PatchMerge = "flat"
    bias: bool = True


@dataclass(frozen=True)
class PromptSpec:
    """
    Attributes:
        template: the conversation template that the model was trained with, a name in
            `models.prompts`.
        use_im_start_end: pictures are framed by `<im_start>` and `<im_end>`.
        use_im_patch_token: the tokenizer was trained with an added `<im_patch>`.
        tokenization: "pieces" (LLaVA, VILA-1.5: the text between pictures, piece by piece) or
            "whole" (transformers' layouts, NVILA: all at once, `<image>` being a token).
        image_suffix: text whose token ids follow each picture's positions; NVILA's is a newline.
    """

    template: str
    use_im_start_end: bool = False
    use_im_patch_token: bool = False
    tokenization: Tokenization = "pieces"
    image_suffix: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """
    Attributes:
        name: the folder's name, or the last part of the Hub id.
        root: the checkpoint's folder.
        layout: a name in `models.checkpoints.layouts`.
        language: the language model's config, of its own family's class.
        tokenizer_path: the folder that holds the tokenizer's files.
        context_length: tokens of prompt and answer together.
    """

    name: str
    root: Path
    layout: str
    precision: Precision
    language: PreTrainedConfig
    vision: VisionSpec
    projector: ProjectorSpec
    prompt: PromptSpec
    tokenizer_path: Path
    context_length: int


@dataclass(frozen=True)
class Checkpoint:
    """A model's description and its tensors, none of which has been read yet."""

    spec: ModelSpec
    language: WeightSource
    projector: WeightSource
    vision: WeightSource
