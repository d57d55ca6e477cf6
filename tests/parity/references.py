"""The same models by other people's code, for the engine to be compared with, token by token.

Nothing of `models` is used here: towers and language models are transformers', tokenisation is
SentencePiece's, and what neither has (LLaVA's padding, VILA's projector) is written out.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)  # fmt: skip

from models.checkpoints.synthesis.configs import CLIP_MEAN
from tests.checkpoint_files import awq_file, read_tensors
from tests.tiny import clip_config
from tests.unit.awq.derived import read_exactly

VOCABULARY = 400
IMAGE = VOCABULARY
"""An id beyond the vocabulary stands for each of a picture's positions."""
TOKENS_PER_PICTURE = 16
LLAMA_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "attention_bias", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "tie_word_embeddings",
)  # fmt: skip


def dequantized(tensors: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """An AWQ file's tensors with plain weights in the place of the 4-bit ones."""
    plain = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = {s: tensors[f"{layer}.{s}"] for s in ("qweight", "scales", "scaled_zeros")}
            plain[f"{layer}.weight"] = torch.from_numpy(read_exactly(parts, group)).float()
        elif suffix not in {"scales", "scaled_zeros"}:
            plain[name] = tensor
    return plain


def tokenize(model: Path, prompt: str) -> list[int]:
    """LLaVA's: chunks by themselves, one BOS, </s> as its token, pictures as 16 positions."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [1]
    for index, chunk in enumerate(prompt.split("<image>")):
        ids += [IMAGE] * TOKENS_PER_PICTURE if index else []
        for turn, text in enumerate(chunk.split("</s>")):
            ids += [2] if turn else []
            ids += processor.encode(text) if text else []
    return ids


class Reference(ABC):
    """Greedy answers, each token computed from the whole sequence anew: no cache to be wrong."""

    tokenizer: Path

    @abstractmethod
    def features(self, picture: Image.Image) -> Tensor:
        """(16, hidden) of one picture."""

    @abstractmethod
    def next_logits(self, ids: list[int], features: Sequence[Tensor]) -> Tensor:
        """(vocabulary,) after `ids`, whose IMAGE positions are the features', in order."""

    @torch.inference_mode()
    def answer(
        self, prompt: str, pictures: Sequence[Image.Image], length: int
    ) -> tuple[list[int], Tensor]:
        """The new tokens, EOS passed over as any other, and their logits."""
        features = [self.features(picture) for picture in pictures]
        ids = tokenize(self.tokenizer, prompt)
        start, logits = len(ids), []
        for _ in range(length):
            logits.append(self.next_logits(ids, features)[:VOCABULARY])
            ids.append(int(logits[-1].argmax()))
        return ids[start:], torch.stack(logits)


class Llava(Reference):
    """transformers' LlavaForConditionalGeneration with a tiny checkpoint's tensors in fp32."""

    def __init__(self, folder: Path, *, quantized: bool, pad: bool, group: int = 128) -> None:
        self.tokenizer = folder / "tokenizer.model"
        self.pad = pad
        own = read_tensors(folder / "model.safetensors")
        language = dequantized(read_tensors(awq_file(folder)), group) if quantized else own
        stored = json.loads((folder / "config.json").read_text())
        config = LlamaConfig(**{key: stored[key] for key in LLAMA_KEYS}, vocab_size=VOCABULARY + 1)
        self.model = LlavaForConditionalGeneration(
            LlavaConfig(  # type: ignore[call-arg]
                vision_config=clip_config(), text_config=config, image_token_id=IMAGE,
                vision_feature_layer=-2, vision_feature_select_strategy="default",
                projector_hidden_act="gelu",
            )
        ).eval()  # fmt: skip
        values = {}
        for name, tensor in {**own, **language}.items():
            name = name.removeprefix("model.vision_tower.vision_tower.vision_model.")
            name = name.replace("model.mm_projector.0", "linear_1")
            values[name.replace("model.mm_projector.2", "linear_2")] = tensor.float()
        used = set()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                short = name
                for prefix in (
                    "model.vision_tower.",
                    "vision_model.",
                    "model.multi_modal_projector.",
                ):
                    short = short.removeprefix(prefix)
                short = short.replace("model.language_model.", "model.")
                parameter.zero_()
                parameter[: len(values[short])] = values[short]
                used.add(short)
        assert {n for n in values if not n.endswith("position_ids")} == used

    def features(self, picture: Image.Image) -> Tensor:
        if self.pad and picture.width != picture.height:
            side = max(picture.size)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in CLIP_MEAN))
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
        return pixels.half().float()

    def next_logits(self, ids: list[int], features: Sequence[Tensor]) -> Tensor:
        pixels = torch.cat(list(features)) if features else None
        logits: Tensor = self.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
        return logits[0, -1]


class Vila(Reference):
    """VILA-1.5 rewritten: transformers' SigLIP and Llama, the projector in plain indexing."""

    def __init__(
        self, folder: Path, *, quantized: bool, order: str = "column", group: int = 128
    ) -> None:
        self.tokenizer = folder / "llm" / "tokenizer.model"
        self.order = order
        self.tower = SiglipVisionModel.from_pretrained(
            folder / "vision_tower", dtype=torch.float32
        ).eval()
        self.projector = {
            name.removeprefix("layers."): tensor.float()
            for name, tensor in read_tensors(folder / "mm_projector/model.safetensors").items()
        }
        self.language = LlamaForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
        if quantized:
            values = dequantized(read_tensors(awq_file(folder)), group)
            self.language.load_state_dict({n: tensor.float() for n, tensor in values.items()})

    def features(self, picture: Image.Image) -> Tensor:
        resized = picture.resize((28, 28), Image.Resampling.BICUBIC)
        processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
        pixels = processor(resized, return_tensors="pt")["pixel_values"].half().float()
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0]
        return self._project(self._downsample(hidden))

    def _downsample(self, hidden: Tensor) -> Tensor:
        """(49, C): a grid of 7 x 7, padded to 8 x 8 at the bottom and right -> (16, 4 C)."""
        grid = torch.zeros(8, 8, hidden.shape[1])
        for row in range(7):
            for column in range(7):
                grid[row, column] = hidden[7 * row + column]
        tokens = []
        for first in range(4):
            for second in range(4):
                row, column = (second, first) if self.order == "column" else (first, second)
                tokens.append(torch.cat([
                    grid[2 * row, 2 * column], grid[2 * row, 2 * column + 1],
                    grid[2 * row + 1, 2 * column], grid[2 * row + 1, 2 * column + 1],
                ]))  # fmt: skip
        return torch.stack(tokens)

    def _project(self, x: Tensor) -> Tensor:
        p = self.projector
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = (x * p["1.weight"] + p["1.bias"]) @ p["2.weight"].T + p["2.bias"]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x @ p["4.weight"].T + p["4.bias"]

    def next_logits(self, ids: list[int], features: Sequence[Tensor]) -> Tensor:
        tokens = torch.tensor(ids)
        embeddings = self.language.get_input_embeddings()(tokens.clamp(max=VOCABULARY - 1))
        if features:
            embeddings[tokens == IMAGE] = torch.cat(list(features))
        logits: Tensor = self.language(inputs_embeds=embeddings[None]).logits
        return logits[0, -1]
