"""CLIP and SigLIP towers, of transformers' modules, as deep as the selected layer asks for."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionModel

from models.checkpoints.spec import VisionSpec


class VisionTower(nn.Module):
    """Pixels -> the hidden state `select_layer`, without what lies behind it.

    Attributes:
        num_tokens: that one picture has here.
        unused: shapes of the tensors that whole towers have and this one does not need, by name.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        model_class: type[PreTrainedModel] = (
            CLIPVisionModel if _is_clip(spec) else SiglipVisionModel
        )
        whole: nn.Module = model_class(spec.config)
        config = copy.deepcopy(spec.config)
        config.num_hidden_layers = layers_needed(spec)
        if not _is_clip(spec):
            config.vision_use_head = False
        model = model_class._from_config(config, attn_implementation="sdpa")
        # Older releases of transformers wrap the modules once more.
        model = getattr(model, "vision_model", model)
        self.embeddings: nn.Module = model.embeddings
        # transformers' spelling
        self.pre_layrnorm: nn.Module = model.pre_layrnorm if _is_clip(spec) else nn.Identity()
        self.encoder: nn.Module = model.encoder
        self._skip_class_token = _is_clip(spec) and spec.select_feature == "patch"
        self.num_tokens = _num_patches(spec) + (_is_clip(spec) and not self._skip_class_token)
        own = {name for name, _ in self.named_parameters()}
        shapes = {
            name.removeprefix("vision_model."): tuple(value.shape)
            for name, value in whole.named_parameters()
        }
        self.unused = {name: shape for name, shape in shapes.items() if name not in own}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, S, S) -> (tiles, num_tokens, hidden)."""
        embedded = self.pre_layrnorm(self.embeddings(pixel_values))
        hidden: Tensor = self.encoder(inputs_embeds=embedded).last_hidden_state
        return hidden[:, 1:] if self._skip_class_token else hidden


def layers_needed(spec: VisionSpec) -> int:
    """Hidden state 0 is the embeddings, state i the output of layer i."""
    states = spec.config.num_hidden_layers + 1
    return spec.select_layer % states


def _is_clip(spec: VisionSpec) -> bool:
    return isinstance(spec.config, CLIPVisionConfig)


def _num_patches(spec: VisionSpec) -> int:
    image_size, patch_size = spec.config.image_size, spec.config.patch_size
    assert isinstance(image_size, int)
    assert isinstance(patch_size, int)
    return int((image_size // patch_size) ** 2)
