"""NVILA with one tile for each picture, against a rewriting of its parts around transformers'."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from models import load_engine
from models.awq.formats import FORMATS
from models.awq.quantize import quantize_rtn
from models.errors import InvalidRequest
from tests.checkpoint_files import Tensors, read_tensors, write_tensors
from tests.parity.hf import HIDDEN, draw, text_configs, write_tokenizer
from tests.parity.test_hf import LENGTH, answer
from tests.parity.test_tokens import ATOL, SQUARE, TALL, WIDE, Question

SIDE, PATCH, WIDTH = 28, 4, 64
GRID = SIDE // PATCH
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MEDIA = ("<vila/sentinel>", "<image>", "<vila/video>")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS: list[Question] = [
    (CHAT.format("Is there a dog?"), ()),
    (CHAT.format("<image>\nWhat is shown in this image?"), (WIDE,)),
    (CHAT.format("<image><image> and <image> Compare  them."), (TALL, SQUARE, WIDE)),
]


class Nvila:
    """Writes a tiny checkpoint, and answers as NVILA's code does."""

    def __init__(self, folder: Path, factor: int, seed: int = 0) -> None:
        """
        Args:
            factor: of the projector's downsampling.
        """
        self.factor = factor
        llm, tower, projector = (folder / n for n in ("llm", "vision_tower", "mm_projector"))
        for part in (llm, tower, projector):
            part.mkdir(parents=True)
        write_tokenizer(llm, added=(*CHAT_TOKENS, *MEDIA), adds_bos=False)
        config = text_configs()["qwen2"]
        # The tokens of media lie behind the vocabulary: NVILA's code grows the embeddings at load.
        config.vocab_size = 300 + len(CHAT_TOKENS)
        self.language = Qwen2ForCausalLM(config).eval()
        vision = SiglipVisionConfig(
            hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            image_size=SIDE, patch_size=PATCH, hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )  # fmt: skip
        self.tower = SiglipVisionModel(vision).eval()
        for model in (self.language, self.tower):
            draw(model, seed)
        self.language.save_pretrained(llm)
        self.tokenizer = AutoTokenizer.from_pretrained(llm)
        assert self.tokenizer.convert_tokens_to_ids(MEDIA[0]) == config.vocab_size
        self.tower.save_pretrained(tower)
        self.processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        self.processor.save_pretrained(tower)
        kind = f"mlp_downsample_{factor}x{factor}_fix"
        (projector / "config.json").write_text(json.dumps({
            "architectures": ["MultimodalProjector"], "model_type": "v2l_projector",
            "mm_projector_type": kind,
        }))  # fmt: skip
        self.projector = self._draw_projector(seed)
        write_tensors(projector, {f"layers.{name}": t for name, t in self.projector.items()})
        (folder / "config.json").write_text(json.dumps({
            "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama",
            "llm_cfg": json.loads((llm / "config.json").read_text()),
            "vision_tower_cfg": json.loads((tower / "config.json").read_text()),
            "mm_projector_cfg": {"mm_projector_type": kind}, "hidden_size": HIDDEN,
            "image_aspect_ratio": "resize", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": False,
            "mm_use_im_patch_token": True, "min_tiles": 1, "max_tiles": 12, "video_max_tiles": 1,
            "num_video_frames": 8, "resume_path": "./elsewhere",
        }))  # fmt: skip

    def _draw_projector(self, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed + 1)

        def linear(name: str, n: int, k: int) -> Tensors:
            weight = torch.randn(n, k, generator=generator) / k**0.5
            return {f"{name}.weight": weight, f"{name}.bias": bias(n)}

        def norm(name: str, n: int) -> Tensors:
            return {f"{name}.weight": 1 + bias(n), f"{name}.bias": bias(n)}

        def bias(n: int) -> Tensor:
            return 0.1 * torch.randn(n, generator=generator)

        if self.factor == 2:
            wide = 4 * WIDTH
            return {
                **norm("1", wide), **linear("2", HIDDEN, wide), **linear("4", HIDDEN, HIDDEN),
            }  # fmt: skip
        wide, narrow = 9 * WIDTH, 3 * WIDTH
        return {
            **norm("1", wide), **linear("2", narrow, wide), **norm("4", narrow),
            **linear("5", HIDDEN, narrow), **linear("7", HIDDEN, HIDDEN),
        }  # fmt: skip

    def quantize(self, folder: Path) -> None:
        """Replaces the language model's 16-bit weights by 4-bit ones."""
        path = folder / "llm/model.safetensors"
        tensors = read_tensors(path)
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            layer = name.removesuffix(".weight")
            weight = quantize_rtn(tensors.pop(name), group_size=64)
            self.language.get_submodule(layer).weight.data = weight.dequantize(torch.float32)
            packed = FORMATS["llm-awq-v2"].pack(weight, torch.float32)
            tensors |= {f"{layer}.{suffix}": value for suffix, value in packed.items()}
        torch.save(tensors, folder / "llm/nvila-tiny-w4-g64-awq-v2.pt")
        path.unlink()

    def features(self, picture: Image.Image) -> Tensor:
        resized = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = self.processor(resized, return_tensors="pt")["pixel_values"].half().float()
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0]
        return self._project(self._downsample(hidden))

    def _downsample(self, hidden: Tensor) -> Tensor:
        """(49, C): 7 x 7 patches, blocks of k x k row by row, zeros at the bottom and right."""
        k, blocks = self.factor, -(-GRID // self.factor)
        zero = torch.zeros(WIDTH)

        def patch(row: int, column: int) -> Tensor:
            return hidden[GRID * row + column] if max(row, column) < GRID else zero

        return torch.stack([
            torch.cat([patch(k * a + row, k * b + column)
                       for row in range(k) for column in range(k)])
            for a in range(blocks) for b in range(blocks)
        ])  # fmt: skip

    def _project(self, x: Tensor) -> Tensor:
        p = self.projector

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        def norm(x: Tensor, name: str) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

        def gelu(x: Tensor) -> Tensor:
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

        if self.factor == 2:
            return linear(gelu(linear(norm(x, "1"), "2")), "4")
        return linear(gelu(linear(norm(gelu(linear(norm(x, "1"), "2")), "4"), "5")), "7")

    @torch.inference_mode()
    def answer(
        self, prompt: str, pictures: Sequence[Image.Image], length: int
    ) -> tuple[list[int], Tensor]:
        """The new tokens and their logits. A newline's embeddings follow each picture's."""
        embed = self.language.get_input_embeddings()
        newline = embed(torch.tensor(self.tokenizer("\n")["input_ids"]))
        remaining = iter(pictures)
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        parts = [
            torch.cat([self.features(next(remaining)), newline]) if token == image
            else embed(torch.tensor([token]))
            for token in self.tokenizer(prompt)["input_ids"]
        ]  # fmt: skip
        x = torch.cat(parts)[None]
        tokens, logits = [], []
        for _ in range(length):
            logits.append(self.language(inputs_embeds=x).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
            x = torch.cat([x, embed(torch.tensor([[tokens[-1]]]))], dim=1)
        return tokens, torch.stack(logits)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("precision", ["W16A16", "W4A16"])
def test_nvila_answers_as_its_parts_do(factor: int, precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "nvila-tiny"
    reference = Nvila(folder, factor)
    if precision == "W4A16":
        reference.quantize(folder)
    expected = [reference.answer(*question, LENGTH) for question in QUESTIONS]
    got = answer(folder, QUESTIONS, LENGTH, precision)
    for (tokens, logits), (right_tokens, right_logits) in zip(got, expected, strict=True):
        assert logits.shape == right_logits.shape
        assert (logits - right_logits).abs().max() < ATOL
        assert tokens == right_tokens


def test_a_token_of_other_media_in_a_prompt_is_refused_and_the_engine_goes_on(
    tmp_path: Path,
) -> None:
    Nvila(tmp_path / "nvila-tiny", 2)
    with load_engine(
        tmp_path / "nvila-tiny", precision="W16A16", device="cpu", dtype="float32", num_threads=1
    ) as engine:
        for token in ("<vila/video>", "<vila/sentinel>"):
            with pytest.raises(InvalidRequest, match=f"prompt: holds the token '{token}', which"):
                list(engine.generate(f"What is in {token}?"))
        assert list(engine.generate("What is in it?"))
