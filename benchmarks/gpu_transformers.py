"""transformers' `generate` in fp16 on a checkpoint's shapes, beside the engine.

The language model is transformers' own class with random weights in 16 bits, the prompt's pictures
come from the checkpoint's tower and projector, and `generate` is given embeddings, which is what
transformers' LLaVA gives its language model, and what VILA's, which transformers lacks, would.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.streams import PROMPT, noise
from models import SamplingParams
from models.checkpoints import open_checkpoint
from models.engine.preparation import RequestPreparer
from models.prompts import load_tokenizer
from models.vision import ImagePreprocessor, load_vision


@dataclass(frozen=True)
class Generated:
    """
    Attributes:
        first_token_s: from the pictures, prepared, to the first token of all streams.
        tokens_per_s: of all streams, after that.
    """

    first_token_s: float
    tokens_per_s: float


class Transformers:
    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        checkpoint = open_checkpoint(folder)
        spec = checkpoint.spec
        # bfloat16 on a CPU, whose products in fp16 are no fair peer.
        self.dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        self._vision = load_vision(checkpoint, device, self.dtype)
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(spec.language, dtype=self.dtype).eval()
        settings = self._model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0  # every answer is equally long
        self._preparer = RequestPreparer(
            spec,
            load_tokenizer(spec.tokenizer_path, spec.prompt.tokenization),
            ImagePreprocessor(
                spec.vision.preprocessing, self._vision.num_tokens_per_tile, spec.projector.merge
            ),
            spec.context_length,
        )

    @torch.inference_mode()
    def generate(self, streams: int, tokens: int, prompt: str = PROMPT) -> Generated:
        requests = [
            self._preparer.prepare(prompt, [picture], SamplingParams())
            for picture in noise(streams)
        ]
        ids = torch.tensor([request.token_ids for request in requests], device=self._device)
        started = time.monotonic()
        embeddings = self._model.get_input_embeddings()(ids.clamp(min=0))
        pictures = self._vision([request.images[0].image for request in requests])
        embeddings[ids < 0] = torch.cat(pictures).to(embeddings.dtype)
        clock = Clock()
        self._model.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens, do_sample=False, use_cache=True, streamer=clock,
        )  # fmt: skip
        first, last = clock.times[0], clock.times[-1]
        return Generated(first - started, streams * (len(clock.times) - 1) / (last - first))

    def first_token_s(self, prompt: str, repeats: int) -> float:
        """Median over repeats, one stream, the preparation left out."""
        return median(self.generate(1, 2, prompt).first_token_s for _ in range(repeats))


class Clock(BaseStreamer):
    """When each step's tokens were there, on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt, of which there are no ids
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass
