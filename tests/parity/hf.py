"""Tiny LLaVA checkpoints that transformers itself makes, saves and answers with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.processing_utils import ProcessorMixin

from tests.checkpoint_files import read_tensors, write_tensors
from tests.tiny import TOKENIZER_TEXT

VOCABULARY = 320
"""Larger than the tokenizer's, as in the released ones."""
HIDDEN, INTERMEDIATE = 128, 256
SIZE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""(height, width): the released ones' shapes, of smaller tiles."""

Spelling = Literal["saved", "old", "new"]
"""Of tensors: as the installed transformers writes them; as the released checkpoints have them; as
releases 4.52 to 4.57 did."""


def text_configs() -> dict[str, PreTrainedConfig]:
    """One of each family, all with grouped queries, no two alike in their positions."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "llama": LlamaConfig(**shared),
        "mistral": MistralConfig(
            **shared, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        "qwen2": Qwen2Config(
            **shared, bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    }  # fmt: skip


def write_tokenizer(
    folder: Path, *, added: Sequence[str] = ("<image>",), adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; Llama's tokenizers begin texts with `<s>`, Qwen's do not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TOKENIZER_TEXT.strip().split("\n"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if adds_bos else None, eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def write_hf(
    folder: Path,
    text: PreTrainedConfig,
    *,
    tiles: bool = False,
    seed: int = 0,
    tokenizer: Callable[[Path], PreTrainedTokenizerFast] = write_tokenizer,
) -> HfReference:
    """LLaVA-1.5's class, or with `tiles` LLaVA-NeXT's, saved by `save_pretrained` in fp32."""
    folder.mkdir(parents=True)
    fast = tokenizer(folder)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    options: dict[str, Any] = {
        "text_config": text, "vision_config": vision, "vision_feature_layer": -2,
        "image_token_index": fast.convert_tokens_to_ids("<image>"),
        "image_seq_length": (SIZE // PATCH) ** 2,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
    }  # fmt: skip
    shared: dict[str, Any] = {
        "patch_size": PATCH, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    model: PreTrainedModel
    processor: ProcessorMixin
    if tiles:
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**options, image_grid_pinpoints=PINPOINTS)
        )
        images = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)
        processor = LlavaNextProcessor(images, fast, **shared)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**options))
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), fast, **shared)
    draw(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return HfReference(model.eval(), processor)


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int) -> None:
    """Weights by which greedy answers vary with prompt and picture."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.1,
                          generator=generator)  # fmt: skip
        else:
            value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
        if "embed_tokens" in name or "lm_head" in name or "linear_2.weight" in name:
            value.mul_(3)


class HfReference:
    """Greedy answers by transformers' processor and model, each token computed anew."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor

    @torch.inference_mode()
    def answer(
        self, prompt: str, pictures: Sequence[Image.Image], length: int
    ) -> tuple[list[int], Tensor]:
        """The new tokens, EOS passed over as any other, and their logits."""
        inputs = self.processor(text=prompt, images=[*pictures] or None, return_tensors="pt")
        if "pixel_values" in inputs:  # rounded as the models' own code does
            inputs["pixel_values"] = inputs["pixel_values"].half().float()
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        start, logits = ids.shape[1], []
        for _ in range(length):
            logits.append(self.model(input_ids=ids, **inputs).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        return ids[0, start:].tolist(), torch.stack(logits)


def respell(folder: Path, spelling: Spelling) -> None:
    """Renames a checkpoint's tensors."""
    tensors = read_tensors(folder / "model.safetensors")
    write_tensors(folder, {respelled(name, spelling): t for name, t in tensors.items()})


def respelled(name: str, spelling: Spelling) -> str:
    """From the name that transformers 5 saves under: "language_model.model.layers...",
    "language_model.lm_head...", "vision_tower.embeddings...", "image_newline"."""
    if spelling == "saved":
        return name
    name = without_wrapper(name).replace("vision_tower.", "vision_tower.vision_model.")
    if spelling == "old":
        return name
    if "lm_head" in name:
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def as_flat(folder: Path, out: Path) -> None:
    """The same model in LLaVA's own layout."""
    hf = json.loads((folder / "config.json").read_text())
    tower = out / "clip"
    tower.mkdir(parents=True)
    write_tokenizer(out)
    text, vision = hf["text_config"], hf["vision_config"]
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[text["model_type"]]
    config = {
        **text, "architectures": [f"Llava{family}ForCausalLM"],
        "model_type": f"llava_{family.lower()}", "mm_vision_tower": "clip",
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    }  # fmt: skip
    if "image_grid_pinpoints" in hf:
        config["image_grid_pinpoints"] = [[w, h] for h, w in hf["image_grid_pinpoints"]]
        config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    (out / "config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps(vision))
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (tower / "preprocessor_config.json").write_text(json.dumps(processor))
    tensors = read_tensors(folder / "model.safetensors")
    write_tensors(out, {flat_name(name): tensor for name, tensor in tensors.items()})


def without_wrapper(name: str) -> str:
    """Older releases of transformers wrap towers once more."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def flat_name(name: str) -> str:
    """transformers' -> LLaVA's."""
    name = without_wrapper(name)
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    if name == "image_newline":
        return "model.image_newline"
    number, _, kind = name.removeprefix("multi_modal_projector.linear_").partition(".")
    return f"model.mm_projector.{2 * (int(number) - 1)}.{kind}"
