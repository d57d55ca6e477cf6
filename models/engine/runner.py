"""A scheduled batch -> logits: everything of a step that computes."""

from __future__ import annotations

import torch
from torch import Tensor

from models.engine.image_cache import ImageEmbeddingCache
from models.engine.scheduler import Batch, Chunk
from models.language.attention import Span
from models.language.attention_backends import attention_backend
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache


class ModelRunner:
    """Owns the model's modules and the KV tensors."""

    def __init__(
        self, decoder: Decoder, images: ImageEmbeddingCache, cache: KVCache, device: torch.device
    ) -> None:
        self.decoder = decoder
        self.images = images
        self.cache = cache
        self.device = device
        self.layouts = attention_backend(device)

    def run(self, batch: Batch) -> Tensor:
        """(chunks that sample, vocabulary) float32 logits, in the order of `batch.sampling`."""
        spans = [Span(c.start, c.end, c.seq.block_table) for c in batch.chunks]
        layout = self.layouts.build(spans, self.cache.shape, self.device)
        hidden = self.decoder(self._embed(batch.chunks), self.cache, layout)
        return self.decoder.logits(hidden[_sampling_rows(batch.chunks).to(hidden.device)])

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        """(tokens, hidden): token embeddings, with the pictures' laid over their positions."""
        token_ids = [t for c in chunks for t in c.seq.token_ids[c.start : c.end]]
        ids = torch.tensor(token_ids, device=self.device)
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


def _sampling_rows(chunks: list[Chunk]) -> Tensor:
    """Indices of the last token of each chunk that samples."""
    rows, end = [], 0
    for chunk in chunks:
        end += chunk.end - chunk.start
        if chunk.samples:
            rows.append(end - 1)
    return torch.tensor(rows, dtype=torch.long)
