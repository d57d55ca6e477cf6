"""Projected picture embeddings, kept by content and bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from models.vision.preprocessing import PreparedImage

Encode = Callable[["Sequence[PreparedImage]"], "list[Tensor]"]


class ImageEmbeddingCache:
    """Least recently used out first. Only the engine's thread touches it."""

    def __init__(self, encode: Encode, capacity_bytes: int) -> None:
        """
        Args:
            encode: tower and projector: pictures -> (num_tokens, hidden) each.
            capacity_bytes: 0 keeps nothing.
        """
        self._encode = encode
        self._capacity = capacity_bytes
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.num_queries = 0
        self.num_encoded = 0

    @property
    def num_hits(self) -> int:
        """Pictures that were asked for and did not need the tower."""
        return self.num_queries - self.num_encoded

    def embed(self, images: Sequence[PreparedImage]) -> dict[bytes, Tensor]:
        """Embeddings by digest. The tower runs once, for all those that are not kept yet."""
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, PreparedImage] = {}
        for image in images:
            if image.digest in self._entries:
                self._entries.move_to_end(image.digest)
                found[image.digest] = self._entries[image.digest]
            else:
                missing[image.digest] = image
        if missing:
            encoded = self._encode(list(missing.values()))
            self.num_encoded += len(encoded)
            for digest, view in zip(missing, encoded, strict=True):
                # A copy of its own: a view would keep the whole tower batch alive uncounted.
                found[digest] = view.clone()
                self._keep(digest, found[digest])
        self.num_queries += len(images)
        return found

    def _keep(self, digest: bytes, embedding: Tensor) -> None:
        self._entries[digest] = embedding
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self._capacity:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.nbytes
