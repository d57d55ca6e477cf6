"""A process that answers with transformers' `generate`, on the same weights in bfloat16.

    python -m benchmarks.transformers_arm MODEL_PATH sequential|batched

It runs on as many threads as the engine.

"sequential" answers one question after another, as a worker without batching does; "batched" puts
all of a round into one `generate`, padded on the left. Prompts and pictures are prepared by the
project's own code, and tokens are not turned into text, which costs the engine something.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.load import Question
from benchmarks.piped_arm import Outbox, serve
from models import SamplingParams
from models.checkpoints import Checkpoint, WeightSource, open_checkpoint
from models.engine.messages import GenerationRequest
from models.engine.preparation import RequestPreparer
from models.engine.sizing import threads_for
from models.prompts import load_tokenizer
from models.vision import ImagePreprocessor

DTYPE = torch.bfloat16
PLACES = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1": "0",
    "model.multi_modal_projector.linear_2": "2",
    "model.vision_tower.": "",
}
"""Beginnings of transformers' names -> of the checkpoint's, within its component."""


class Llava:
    """transformers' LlavaForConditionalGeneration with a checkpoint's (dequantised) tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.spec
        if spec.layout != "llava" or spec.projector.kind != "mlp2x_gelu":
            raise SystemExit("transformers has LLaVA's mlp2x_gelu only")
        self.image_id = spec.language.vocab_size
        """One beyond the vocabulary stands for each of a picture's positions."""
        language = type(spec.language).from_dict(
            {**spec.language.to_dict(), "vocab_size": self.image_id + 1}
        )
        config = LlavaConfig(
            vision_config=spec.vision.config, text_config=language,
            image_token_index=self.image_id, vision_feature_layer=spec.vision.select_layer,
            vision_feature_select_strategy="default", projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )  # fmt: skip
        self.model = LlavaForConditionalGeneration(config).bfloat16().eval()
        self._fill(checkpoint)
        settings = self.model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0  # every answer is equally long

    @torch.no_grad()
    def _fill(self, checkpoint: Checkpoint) -> None:
        for name, parameter in self.model.named_parameters():
            prefix = next((p for p in PLACES if name.startswith(p)), "")
            own = PLACES.get(prefix, "") + name.removeprefix(prefix)
            if "vision_tower" in prefix:
                value = self._tower(checkpoint.vision, own)
            elif "projector" in prefix:
                value = checkpoint.projector.get(own)
            else:
                value = self._language(checkpoint.language, own)
            parameter[: len(value)] = value
            parameter[len(value) :].zero_()  # the added token's row

    @staticmethod
    def _tower(source: WeightSource, name: str) -> Tensor:
        return source.get(name.removeprefix("vision_model."))

    @staticmethod
    def _language(source: WeightSource, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if source.is_quantized(layer):
            return source.quantized(layer).dequantize(DTYPE)
        return source.get(name)


class TransformersModel:
    def __init__(self, model_path: str, mode: str) -> None:
        checkpoint = open_checkpoint(model_path)
        spec = checkpoint.spec
        torch.set_num_threads(threads_for(spec.language, len(os.sched_getaffinity(0))))
        self._batched = mode == "batched"
        self._llava = Llava(checkpoint)
        patch = spec.vision.config.patch_size
        assert isinstance(patch, int)
        side = spec.vision.preprocessing.crop_size // patch
        self._preparer = RequestPreparer(
            spec,
            load_tokenizer(spec.tokenizer_path),
            ImagePreprocessor(spec.vision.preprocessing, side**2),
            spec.context_length,
        )

    def answer(self, questions: Sequence[Question], num_tokens: int, outbox: Outbox) -> None:
        groups = (
            [[*range(len(questions))]] if self._batched else [[n] for n in range(len(questions))]
        )
        for group in groups:
            requests = [self._prepare(questions[number]) for number in group]
            self._generate(requests, num_tokens, TokenCounter(group, outbox))

    def _prepare(self, question: Question) -> GenerationRequest:
        picture = Image.open(io.BytesIO(question.picture))
        return self._preparer.prepare(question.prompt, [picture], SamplingParams())

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[GenerationRequest], num_tokens: int, streamer: BaseStreamer
    ) -> None:
        longest = max(len(request.token_ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            tokens = torch.tensor(request.token_ids)
            tokens[tokens < 0] = self._llava.image_id
            ids[row, -len(tokens) :] = tokens
            mask[row, -len(tokens) :] = 1
        pixels = torch.cat([span.image.pixel_values for r in requests for span in r.images])
        self._llava.model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels.to(DTYPE),
            max_new_tokens=num_tokens, do_sample=False, use_cache=True, streamer=streamer,
        )  # fmt: skip


class TokenCounter(BaseStreamer):
    """Passes on that a token has come for each question of a batch."""

    def __init__(self, numbers: Sequence[int], outbox: Outbox) -> None:
        self._numbers = numbers
        self._outbox = outbox
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for number in self._numbers:
            self._outbox.add(number, 1)
        self._outbox.flush()

    def end(self) -> None:
        pass


if __name__ == "__main__":
    serve(partial(TransformersModel, sys.argv[1], sys.argv[2]))
