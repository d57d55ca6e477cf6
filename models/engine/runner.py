"""A scheduled batch -> logits: everything of a step that computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.engine.image_cache import ImageEmbeddingCache
from models.engine.in_flight import InFlight
from models.engine.prompt_scores import score_prompts
from models.engine.scheduler import Batch, Chunk
from models.engine.sequence import IN_FLIGHT
from models.language.attention import AttentionBatch, Span
from models.language.decoder import Decoder
from models.language.kv_cache import KVCache
from models.transfer import upload


class ModelRunner:
    """Owns the model's modules and the KV tensors."""

    def __init__(
        self, decoder: Decoder, images: ImageEmbeddingCache, cache: KVCache, device: torch.device
    ) -> None:
        self.decoder = decoder
        self.images = images
        self.cache = cache
        self.device = device

    def run(self, batch: Batch, in_flight: InFlight | None = None) -> Tensor:
        """(chunks that sample, vocabulary) float32 logits, in the order of `batch.sampling`.

        Args:
            in_flight: the step before, whose tokens may not have been fetched yet.
        """
        spans = [Span(c.start, c.end, c.seq.block_table) for c in batch.chunks]
        layout = AttentionBatch.build(spans, self.cache.shape, self.device)
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
        """(tokens,) int64. Those in flight never come here: they go from tensor to tensor."""
        token_ids = np.concatenate(
            [np.frombuffer(c.seq.token_ids, dtype=np.int64)[c.start : c.end] for c in chunks]
        )
        ids = upload(token_ids, self.device)
        to = np.flatnonzero(token_ids == IN_FLIGHT)
        if not to.size:
            return ids
        assert in_flight is not None
        ends = np.cumsum([c.end - c.start for c in chunks])
        row_of = {id(seq): row for row, seq in enumerate(in_flight.seqs)}
        rows = [row_of[id(chunks[index].seq)] for index in np.searchsorted(ends, to, side="right")]
        tokens = in_flight.tokens.to(self.device, non_blocking=True)
        ids[upload(to, self.device)] = tokens[upload(rows, self.device)]
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
