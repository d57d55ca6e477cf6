"""Picture embeddings are kept by content, in a bounded number of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.engine.image_cache import ImageEmbeddingCache
from tests.unit.engine.harness import BLOCK, HIDDEN, Picture, build_core, encode, request, run_all

PER_TOKEN = HIDDEN * 4
pictures = st.builds(
    lambda i: Picture(bytes([i]), 1 + i % 5), st.integers(0, 9)
)  # the digest decides the size, as content does


def cache(capacity: int) -> tuple[ImageEmbeddingCache, list[list[bytes]]]:
    """And the digests of each call of the tower, whose outputs are views of one batch."""
    calls: list[list[bytes]] = []

    def watched(images: Sequence[Picture]) -> list[Tensor]:
        calls.append([image.digest for image in images])
        return list(torch.cat(encode(images)).split([image.num_tokens for image in images]))

    return ImageEmbeddingCache(watched, capacity), calls  # type: ignore[arg-type]


@given(st.lists(st.lists(pictures, max_size=6), max_size=15), st.integers(0, 12 * PER_TOKEN))
def test_bytes_are_bounded_and_embeddings_right(
    batches: list[list[Picture]], capacity: int
) -> None:
    images, _ = cache(capacity)
    for batch in batches:
        got = images.embed(batch)  # type: ignore[arg-type]
        assert images.num_bytes <= capacity
        assert images.num_bytes == sum(t.nbytes for t in images._entries.values())
        for picture in batch:
            assert torch.equal(got[picture.digest], encode([picture])[0])


def test_the_tower_runs_once_for_a_batch_and_only_for_what_is_new() -> None:
    images, calls = cache(1 << 20)
    a, b, c = (Picture(bytes([i]), 2) for i in range(3))
    images.embed([a, b, a])  # type: ignore[list-item]
    images.embed([b, c, a])  # type: ignore[list-item]
    images.embed([a, b, c])  # type: ignore[list-item]
    assert calls == [[b"\0", b"\1"], [b"\2"]] and images.num_encoded == 3


def test_the_least_recently_used_goes_first() -> None:
    images, calls = cache(2 * 2 * PER_TOKEN)
    a, b, c = (Picture(bytes([i]), 2) for i in range(3))
    for picture in (a, b, a, c, a, b):
        images.embed([picture])  # type: ignore[list-item]
    assert calls == [[b"\0"], [b"\1"], [b"\2"], [b"\1"]]


def test_a_kept_embedding_does_not_keep_its_whole_batch_alive() -> None:
    """A view of the tower's output would hold memory that the bound does not count."""
    images, _ = cache(1 << 20)
    batch = [Picture(bytes([i]), 2) for i in range(8)]
    got = images.embed(batch)  # type: ignore[arg-type]
    for embedding in got.values():
        assert embedding.untyped_storage().nbytes() == embedding.nbytes


def test_a_picture_larger_than_the_cache_is_served_and_not_kept() -> None:
    images, calls = cache(3 * PER_TOKEN)
    large = Picture(b"\7", 5)
    for _ in range(2):
        assert images.embed([large])[b"\7"].shape == (5, HIDDEN)  # type: ignore[list-item]
        assert images.num_bytes == 0
    assert len(calls) == 2


def test_requests_that_come_together_share_one_run_of_the_tower() -> None:
    """Two new pictures of three requests, two of which ask about the same one behind other texts;
    and asking again costs no further run."""
    core = build_core(budget=256, seqs=3)
    images, calls = cache(1 << 20)
    core.runner.images = images
    a, b = Picture(b"\0", 5), Picture(b"\1", 5)
    for turn in range(2):
        for name, start, picture in (("x", 1, a), ("y", 2, b), ("z", 6, a)):
            core.add(request(f"{name}{turn}", range(2 + start, 22 + start), [(start, picture)]))
        run_all(core)
    assert calls == [[b"\0", b"\1"]]


def test_a_long_prompt_keeps_its_embeddings_until_its_prefill_is_past_them() -> None:
    """Chunks smaller than the picture, and no cache at all: the tower still runs once."""
    core = build_core(budget=3, image_bytes=0, caching=False)
    core.add(request("r", range(2, 22), [(1, Picture(b"\1", 9))], max_new_tokens=2))
    held = []
    while core.has_work:
        core.step()
        held.append(sum(len(seq.image_embeddings) for seq in core.scheduler.running))
    assert core.runner.images.num_encoded == 1
    assert held[0] == 1 and held[3:] == [0] * len(held[3:]), "let go when the prefill is past it"


def test_an_aborted_request_lets_its_embeddings_go() -> None:
    core = build_core(budget=3, image_bytes=0, caching=False)
    core.add(request("r", range(2, 22), [(1, Picture(b"\1", 9))], max_new_tokens=2))
    core.step()
    (seq,) = core.scheduler.running
    assert seq.image_embeddings
    core.abort("r")
    assert not seq.image_embeddings
    assert run_all(core) == [] and core.stats().block_size == BLOCK
