"""LLaVA-v0 and v1: a linear projector, pictures cropped and framed by tokens of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.checkpoint_files import awq_file, read_tensors, rewrite_json, rewrite_tensors
from tests.parity.references import LLAMA_KEYS, dequantized
from tests.parity.test_hf import answer
from tests.parity.test_tokens import ATOL, SQUARE, TALL, WIDE, Question
from tests.tiny import clip_config, write_tiny_llava

LENGTH = 16
SYSTEM = "A chat between a curious human and an artificial intelligence assistant."
QUESTIONS: list[Question] = [
    (f"{SYSTEM}###Human: Is there a dog?###Assistant:", ()),
    (f"{SYSTEM}###Human: <image>\nWhat is shown in this image?###Assistant:", (WIDE,)),
    (f"{SYSTEM}###Human: <image>\n<image> or <image>?###Assistant:", (TALL, SQUARE, WIDE)),
]
PIECES = 400
ADDED = {"<im_patch>": PIECES, "<im_start>": PIECES + 1, "<im_end>": PIECES + 2}
IMAGE = -200


def write(folder: Path) -> None:
    write_tiny_llava(folder, projector="linear", image_aspect_ratio=None)
    rewrite_json(
        folder / "config.json", mm_projector_type=None, mm_use_im_start_end=True,
        mm_use_im_patch_token=None, vocab_size=PIECES + len(ADDED),
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(len(ADDED), 256, generator=generator).half()

    def grow(tensors: dict[str, Tensor]) -> None:
        for name, rows in (("model.embed_tokens.weight", drawn), ("lm_head.weight", drawn / 16)):
            tensors[name] = torch.cat([tensors[name], rows])

    for path in (folder / "model.safetensors", awq_file(folder)):
        rewrite_tensors(path, grow)


def tokenize(model: Path, prompt: str) -> list[int]:
    """As LLaVA's code: the text is cut at pictures, then at added tokens; each piece by itself."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    known = {**ADDED, "<image>": IMAGE}
    framed = prompt.replace("<image>", "<im_start><image><im_end>")
    ids = [1]
    for piece in re.split("(<im_start>|<im_end>|<image>)", framed):
        ids += [known[piece]] if piece in known else processor.encode(piece) if piece else []
    return ids


class LlavaV1:
    def __init__(self, folder: Path, quantized: bool) -> None:
        self.tokenizer = folder / "tokenizer.model"
        own = {n: t.float() for n, t in read_tensors(folder / "model.safetensors").items()}
        stored = json.loads((folder / "config.json").read_text())
        self.language = LlamaForCausalLM(
            LlamaConfig(**{key: stored[key] for key in LLAMA_KEYS}, vocab_size=stored["vocab_size"])
        ).eval()
        language = dequantized(read_tensors(awq_file(folder)), 128) if quantized else own
        self.language.load_state_dict({n: language[n].float() for n in self.language.state_dict()})
        self.tower = CLIPVisionModel(clip_config()).eval()
        prefix = "model.vision_tower.vision_tower.vision_model."
        with torch.no_grad():
            for name, parameter in self.tower.named_parameters():
                parameter.copy_(own[prefix + name.removeprefix("vision_model.")])
        self.weight = own["model.mm_projector.weight"]
        self.bias = own["model.mm_projector.bias"]

    def features(self, picture: Image.Image) -> Tensor:
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        pixels = processor(picture, return_tensors="pt")["pixel_values"].half().float()
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        return hidden @ self.weight.T + self.bias

    @torch.inference_mode()
    def answer(self, prompt: str, pictures: Sequence[Image.Image]) -> tuple[list[int], Tensor]:
        embed = self.language.get_input_embeddings()
        remaining = iter(pictures)
        x = torch.cat([
            self.features(next(remaining)) if token == IMAGE else embed(torch.tensor([token]))
            for token in tokenize(self.tokenizer, prompt)
        ])[None]  # fmt: skip
        tokens, logits = [], []
        for _ in range(LENGTH):
            logits.append(self.language(inputs_embeds=x).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
            x = torch.cat([x, embed(torch.tensor([[tokens[-1]]]))], dim=1)
        return tokens, torch.stack(logits)


@pytest.mark.parametrize("precision", ["W16A16", "W4A16"])
def test_llavas_first_models_answer_as_their_parts_do(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "LLaVA-7B-v0"
    write(folder)
    reference = LlavaV1(folder, quantized=precision == "W4A16")
    expected = [reference.answer(*question) for question in QUESTIONS]
    got = answer(folder, QUESTIONS, LENGTH, precision)
    for (tokens, logits), (right_tokens, right_logits) in zip(got, expected, strict=True):
        assert (logits - right_logits).abs().max() < ATOL
        assert tokens == right_tokens
