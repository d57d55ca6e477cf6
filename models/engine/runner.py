"""A scheduled batch -> logits: everything of a step that computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.engine.decode_graphs import DecodeGraphs
from models.engine.image_cache import ImageEmbeddingCache
from models.engine.in_flight import InFlight
from models.engine.input_tokens import KNOWN, InputTokens, spans_of
from models.engine.prompt_scores import score_prompts
from models.engine.scheduler import Batch, Chunk
from models.language.attention import AttentionBatch
from models.language.attention_backends import StepLayout
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache
from models.transfer import upload


class ModelRunner:
    """Owns the model's modules and the KV tensors."""

    def __init__(
        self,
        decoder: Decoder,
        images: ImageEmbeddingCache,
        cache: KVCache,
        device: torch.device,
        *,
        attention: type[StepLayout] = AttentionBatch,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """
        Args:
            device: where embeddings and layouts go first.
            graphs: of the same decoder and cache.
        """
        self.decoder = decoder
        self.images = images
        self.cache = cache
        self.device = device
        self.attention = attention
        self.graphs = graphs

    def run(self, batch: Batch, in_flight: InFlight | None = None) -> Tensor:
        """(chunks that sample, vocabulary) float32 logits, in the order of `batch.sampling`.

        Args:
            in_flight: the step before, whose tokens may not have been fetched yet.
        """
        if self.graphs is not None and self.graphs.can_run(batch):
            return self.graphs.run(batch, in_flight)
        layout = self.attention.build(spans_of(batch), self.cache.shape, self.device)
        hidden = self.decoder(self._embed(batch.chunks, in_flight), self.cache, layout)
        score_prompts(batch.chunks, hidden, self.decoder.logits)
        return self.decoder.logits(hidden[_sampling_rows(batch.chunks, hidden.device)])

    def _embed(self, chunks: list[Chunk], in_flight: InFlight | None) -> Tensor:
        """(tokens, hidden): token embeddings, with the pictures' laid over their positions."""
        ids = self._token_ids(chunks, in_flight)
        embeddings = self.decoder.embed(ids.clamp(min=0))  # picture positions hold negative ids
        self._encode_images(chunks)
        row = 0
        for chunk in chunks:
            for index, span in enumerate(chunk.seq.images):
                first, last = max(chunk.start, span.start), min(chunk.end, span.end)
                if first < last:
                    picture = chunk.seq.image_embeddings[index][
                        first - span.start : last - span.start
                    ]
                    at = row + first - chunk.start
                    embeddings[at : at + last - first] = picture.to(embeddings.dtype)
                if span.end <= chunk.end:
                    chunk.seq.image_embeddings.pop(index, None)  # its prefill is past it
            row += chunk.end - chunk.start
        return embeddings

    def _token_ids(self, chunks: list[Chunk], in_flight: InFlight | None) -> Tensor:
        """(tokens,) int64."""
        inputs = InputTokens.of(chunks, in_flight)
        ids = upload(inputs.ids, self.device)
        (to,) = np.nonzero(inputs.sources != KNOWN)
        if in_flight is not None and to.size:
            tokens = in_flight.tokens.to(self.device)
            ids[upload(to, self.device)] = tokens[upload(inputs.sources[to], self.device)]
        return ids

    def _encode_images(self, chunks: list[Chunk]) -> None:
        """Gives the sequences the embeddings that their chunks need; one tower run for all."""
        needed = [
            (chunk.seq, index, span.image)
            for chunk in chunks
            for index, span in enumerate(chunk.seq.images)
            if span.start < chunk.end and chunk.start < span.end
            and index not in chunk.seq.image_embeddings
        ]  # fmt: skip
        if needed:
            embeddings = self.images.embed([image for _, _, image in needed])
            for seq, index, image in needed:
                seq.image_embeddings[index] = embeddings[image.digest]


def _sampling_rows(chunks: list[Chunk], device: torch.device) -> Tensor:
    """Indices of the last token of each chunk that samples."""
    rows, end = [], 0
    for chunk in chunks:
        end += chunk.end - chunk.start
        if chunk.samples:
            rows.append(end - 1)
    return upload(rows, device, torch.long)
